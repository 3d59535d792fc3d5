"""What a contestant of ``peers.py`` runs in: a process of its own that answers JSON lines.

The parent writes one request a line to stdin, ``{"op": "decode", "context": 128, "steps": 10}``, and reads one answer a
line, ``{"seconds": [...]}`` or ``{"error": "..."}``. Everything else that libraries print goes to stderr. Imports only
the standard library and numpy: it runs in each peer's own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]

TOKEN = 7
CHUNK_TOKENS = 512
"""Of what fills a cache: a whole text at once would need the logits of all its tokens from some."""
SETTLING_STEPS = 3
"""Not timed: after another process ran, caches are cold and threads asleep."""
SEED = 0


class Peer(Protocol):
    """One engine with one model. Its constructor imports what it needs."""

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        """Open a model, ready for texts of at most ``capacity_tokens``."""
        ...

    def append(self, ids: Sequence[int]) -> Any:
        """Run tokens behind those held, to the logits of the last, float32 ``[V]``, in host memory."""
        ...

    def rewind(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens."""
        ...

    def logits(self, ids: Sequence[int]) -> Array:
        """float32 ``[T, V]`` of a text of its own. What was held is lost."""
        ...


class Worker:
    """The requests, one method each; what they return is the answer."""

    def __init__(self, make: Callable[..., Peer]) -> None:
        self.make = make
        self.held_tokens = 0
        self.peer: Peer

    def load(self, path: str, threads: int, capacity_tokens: int, **options: Any) -> dict[str, Any]:
        """options: of the peer's constructor."""
        begin = time.perf_counter()
        self.peer = self.make(**options)
        imported = time.perf_counter()
        self.peer.load(path, threads, capacity_tokens)
        return {"import_s": imported - begin, "load_s": time.perf_counter() - imported}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds from an empty cache to the logits of a prompt's last token."""
        ids = random_ids(tokens)
        self._rewind(0)
        begin = time.perf_counter()
        self.peer.append(ids)
        self.held_tokens = tokens
        return {"seconds": time.perf_counter() - begin}

    def fill(self, tokens: int) -> dict[str, Any]:
        """Hold ``tokens`` tokens, those that are held already among them."""
        ids = random_ids(tokens)
        if self.held_tokens > tokens:
            self._rewind(tokens)
        while self.held_tokens < tokens:
            chunk = ids[self.held_tokens : min(self.held_tokens + CHUNK_TOKENS, tokens)]
            self.peer.append(chunk)
            self.held_tokens += len(chunk)
        return {}

    def decode(self, context: int, steps: int, settling: int = SETTLING_STEPS) -> dict[str, Any]:
        """Seconds of each step that makes a text ``context`` tokens long, to its logits; going back is not timed.

        So 8,192 tokens are the last that a model trained on 8,192 has, and genai allows.
        """
        held = context - 1
        self.fill(held)
        seconds = []
        for step in range(-settling, steps):
            begin = time.perf_counter()
            self.peer.append([TOKEN])
            took = time.perf_counter() - begin
            self.peer.rewind(held)
            if step >= 0:
                seconds.append(took)
        return {"seconds": seconds}

    def generate(self, prompt: int, steps: int) -> dict[str, Any]:
        """A prompt and greedy steps behind it, as a user would; what a fresh process takes for it."""
        begin = time.perf_counter()
        logits = self.peer.append(random_ids(prompt))
        first = time.perf_counter()
        for _ in range(steps):
            logits = self.peer.append([int(np.argmax(logits))])
        self.held_tokens = prompt + steps
        return {
            "first_token_s": first - begin,
            "steps_s": time.perf_counter() - first,
            "peak_bytes": status_bytes("VmHWM"),
        }

    def logits(self, tokens: Sequence[int], file: str) -> dict[str, Any]:
        """Writes float32 ``[T, V]`` to ``file``, an .npy."""
        np.save(file, self.peer.logits(tokens))
        self.held_tokens = 0
        return {}

    def _rewind(self, tokens: int) -> None:
        self.peer.rewind(tokens)
        self.held_tokens = tokens


def random_ids(tokens: int) -> list[int]:
    """The same at each call, a shorter text the beginning of a longer one."""
    return np.random.default_rng(SEED).integers(1000, 40_000, tokens).tolist()


def status_bytes(field: str) -> int:
    """``VmRSS``, resident now, or ``VmHWM``, the most there has been, of this process."""
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def serve(make: Callable[..., Peer]) -> None:
    """Answer requests until stdin ends or says ``quit``. A failed request is answered, and the next one is read."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(make)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            return
        try:
            answer = getattr(worker, op)(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
