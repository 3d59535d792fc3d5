"""The thread that runs the scheduler's steps, and what other threads may ask of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from pe_onnx.errors import PeOnnxError
from pe_onnx.server.scheduler import Event, Scheduler, Work
from pe_onnx.server.slots import Slots

Publish = Callable[[list[tuple[Work, Event]]], None]
"""Takes the events of a step, in the engine's thread."""

log = logging.getLogger("pe_onnx.server")

CLOSED = "the server is shutting down"
LONGEST_WAIT_S = 60
AVERAGED = 0.1
"""Weight of the newest request in the average of how long requests take."""


class QueueFullError(PeOnnxError):
    """More requests than may wait. ``retry_after_s``: when some of them will have ended, at today's pace."""

    def __init__(self, waiting: int, most: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} answers would wait, and at most {most} may; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(PeOnnxError):
    """The engine is stopping, or has failed."""


class Engine:
    """Runs requests in the slots, from ``start`` to ``close``.

    max_queue: requests that wait at most, besides those in slots. The public methods may be called by any thread.
    """

    def __init__(self, slots: Slots, max_queue: int) -> None:
        self.slots = slots
        self.max_queue = max_queue
        self.steps = 0
        """Steps taken."""
        self._events: list[tuple[Work, Event]] = []
        self.scheduler = Scheduler(slots, lambda work, event: self._events.append((work, event)))
        self._inbox: list[Work] = []
        self._in_flight: dict[Work, float] = {}
        self._average_s = 1.0
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._publish: Publish = lambda events: None

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Requests in slots."""
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        return max(len(self._in_flight) - self.scheduler.running, 0)

    def start(self, publish: Publish) -> None:
        self._publish = publish
        self._thread = threading.Thread(target=self._run, name="pe-onnx engine", daemon=True)
        self._thread.start()

    def submit(self, works: Sequence[Work]) -> None:
        """Take all of some requests, or none. Raises QueueFullError and ClosedError."""
        with self._wake:
            if not self.alive:
                raise ClosedError(CLOSED)
            if len(self._in_flight) + len(works) > self.slots.batch_size + self.max_queue:
                rounds = len(self._in_flight) / self.slots.batch_size
                wait_s = min(max(math.ceil(self._average_s * rounds), 1), LONGEST_WAIT_S)
                waiting = len(self._in_flight) + len(works) - self.slots.batch_size
                raise QueueFullError(waiting, self.max_queue, wait_s)
            self._in_flight |= dict.fromkeys(works, time.monotonic())
            self._inbox.extend(works)
            self._wake.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Give requests up: their rows are free before the next step. Those that have ended stay as they are."""
        for work in works:
            work.cancelled = True

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # nobody may wait for ever
            with self._wake:
                self._closing = True
                left = list(self._in_flight)
            self._events = [(work, Event(finish="closed", message=CLOSED)) for work in left]
            self._hand_out()

    def _turn(self) -> bool:
        """Take a step, as soon as there is work; False where that was the last one."""
        with self._wake:
            while not self._inbox and self.scheduler.idle and not self._closing:
                self._wake.wait()
            closing = self._closing
            for work in self._inbox:
                self.scheduler.submit(work)
            self._inbox.clear()
        if closing:
            self.scheduler.end_all(Event(finish="closed", message=CLOSED))
        else:
            try:
                self.scheduler.step()
            except Exception:  # of our own making
                log.exception("a step failed; its requests end, and the slots are emptied")
                self.scheduler.end_all(Event(finish="error", message="a step failed"))
            self.steps += 1
        self._hand_out()
        return not closing

    def _hand_out(self) -> None:
        events, self._events = self._events, []
        now = time.monotonic()
        with self._wake:
            for work, event in events:
                if event.finish:
                    begun = self._in_flight.pop(work, now)
                    self._average_s += AVERAGED * (now - begun - self._average_s)
        if events:
            self._publish(events)
