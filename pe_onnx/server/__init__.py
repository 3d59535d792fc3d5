"""An HTTP server with OpenAI's API over one bundle: requests join and leave a running batch at every step.

``slots``      the cache: rows of different lengths that one run reads, and what is left in them for later prompts
``scheduler``  which request runs in which row, a step at a time; no thread, no text
``engine``     the thread that takes steps, and hands tokens to whoever asked
``protocol``   what a request may say; ``asking`` makes of it what the scheduler runs
``answers``    what OpenAI's clients read
``app``        the application: routes and errors; ``guard`` has the key and the limits of every request, ``sending``
               streams and notices clients that leave
``running``    from a folder to a server that listens, and ends
``replicas``   the same application in Ray Serve
"""
