"""Which request runs in which row, one step at a time: continuous batching.

Source: iteration-level scheduling of Orca (Yu et al. 2022, section 3.2): after each step of the batch requests that
ended leave it, and waiting ones join. Here a step is

    1. requests that were given up, or whose time is over, leave
    2. waiting requests take free rows, first come, first served, and prompts are run, ``CHUNK_TOKENS`` at most in all,
       so that those who generate wait for a chunk and not for a prompt
    3. rows that generate take one token each, in one run

A request is given the row whose content its prompt begins with, or else the one that was used longest ago. Nothing
here knows text, threads or HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pe_onnx.cached_rows import CHUNK_TOKENS, Array
from pe_onnx.errors import PeOnnxError
from pe_onnx.sampling import Sampler
from pe_onnx.server.slots import Slots


class Likelihoods(NamedTuple):
    """Natural logarithms of probabilities, before temperature and other options."""

    chosen: float
    top: list[tuple[int, float]]
    """Token ids, the most likely first."""


class Event(NamedTuple):
    """A token of a request, or its end, or both."""

    token: int | None = None
    likelihoods: Likelihoods | None = None
    finish: str | None = None
    """``stop`` (an end token, which is ``token``), ``length``, ``timeout``, ``error`` or ``closed``."""
    message: str | None = None
    """Why it has no answer, for the log."""


@dataclass(eq=False)
class Work:
    """One prompt to continue: what the scheduler is given, and how far it is."""

    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler
    choice: int = 0
    """Which of the sampler's rows draws."""
    ends: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    """How many likely tokens to tell at each step; None tells nothing."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits, by token id."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    deadline: float = float("inf")
    """Of ``time.monotonic()``."""
    cancelled: bool = False
    row: int | None = None
    new: list[int] = field(default_factory=list)
    reused_tokens: int = 0
    begun: float | None = None
    """When it was given a row, by ``time.monotonic()``."""

    @property
    def left(self) -> int:
        """New tokens that it may still have."""
        return self.max_new_tokens - len(self.new)

    @property
    def plain(self) -> bool:
        """Whether its next token is the most likely one."""
        options = self.sampler.options
        altered = self.bias or self.presence_penalty or self.frequency_penalty
        return options.temperature == 0 and options.repetition_penalty == 1 and not altered


class Scheduler:
    """A batch that requests join and leave at every step. Not for several threads; see ``Engine``.

    deliver: called with each event of each request, in order.
    """

    def __init__(self, slots: Slots, deliver: Callable[[Work, Event], None]) -> None:
        self.slots = slots
        self.deliver = deliver
        self.waiting: deque[Work] = deque()
        self.owners: list[Work | None] = [None] * slots.batch_size
        self._used = [0] * slots.batch_size
        self._clock = 0

    @property
    def running(self) -> int:
        return sum(owner is not None for owner in self.owners)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, work: Work) -> None:
        self.waiting.append(work)

    def step(self) -> None:
        """One round of prompts and one token for each row that generates."""
        self._drop()
        self._fill()
        self._generate()

    def end_all(self, event: Event) -> None:
        """End every request so, and forget every row."""
        for work in [*self.waiting, *(owner for owner in self.owners if owner)]:
            self._end(work, event)
        self.waiting.clear()
        self.slots.truncate([0] * self.slots.batch_size)

    def _drop(self) -> None:
        now = time.monotonic()
        gone = [work for work in self.waiting if work.cancelled or work.deadline <= now]
        for work in [*gone, *(w for w in self.owners if w and (w.cancelled or w.deadline <= now))]:
            self._end(work, Event(finish="stop" if work.cancelled else "timeout"))
        if gone:
            self.waiting = deque(work for work in self.waiting if work not in gone)

    def _end(self, work: Work, event: Event) -> None:
        if work.row is not None:
            self._clock += 1
            self._used[work.row] = self._clock
            self.owners[work.row] = None
            work.row = None
        self.deliver(work, event)

    def _fill(self) -> None:
        budget = CHUNK_TOKENS
        while budget > 0:
            work = next((w for w in self.owners if w and self._unread(w)), None) or self._admit()
            if work is None:
                return
            assert work.row is not None
            rest = work.prompt[int(self.slots.lengths[work.row]) :]
            count = min(len(rest), self.slots.next_chunk(work.row))
            if not self.slots.alone:
                count = min(count, budget)
            budget -= count
            logits = self._guarded([work], partial(self.slots.fill_row, work.row, rest[:count]))
            if logits is not None and count == len(rest):
                self._take([work], logits[None])

    def _unread(self, work: Work) -> bool:
        """Whether part of its prompt has still to be run."""
        return work.row is not None and not work.new and self.slots.lengths[work.row] < len(work.prompt)

    def _admit(self) -> Work | None:
        """Give the first that waits a row, with as much of its prompt as some row holds already."""
        if not self.waiting or self.running == len(self.owners):
            return None
        work = self.waiting[0]
        common = [self.slots.in_common(row, work.prompt) for row in range(len(self.owners))]
        free = [row for row, owner in enumerate(self.owners) if owner is None]
        best = max(range(len(common)), key=lambda row: (common[row], self.owners[row] is None))
        held = int(self.slots.lengths[best])
        if common[best] and self.owners[best] is None and (not self.slots.shares or 2 * common[best] >= held):
            row = best
        else:  # what the best row holds besides may be asked for again
            row = min(free, key=lambda row: (self.slots.lengths[row] > 0, self._used[row]))
        if self.slots.shares and common[best] > common[row]:
            self.slots.copy_beginning(best, row, common[best])
        else:
            self.slots.cut(row, common[row])
        self.waiting.popleft()
        work.row, self.owners[row] = row, work
        work.reused_tokens = int(self.slots.lengths[row])
        work.begun = time.monotonic()
        return work

    def _generate(self) -> None:
        generating = [w for w in self.owners if w and not self._unread(w)]
        if self.slots.alone:
            batches = [[work] for work in generating]
        else:
            batches = [self._gathered(generating)] if generating else []
        for works in batches:
            first, tokens = works[0].row or 0, [work.new[-1] for work in works]
            logits = self._guarded(works, partial(self.slots.step, first, tokens))
            if logits is not None:
                self._take(works, logits)

    def _gathered(self, works: list[Work]) -> list[Work]:
        """Some requests in the order of their rows, which lie side by side after as few exchanges as it takes."""
        n, rows = len(works), sorted(work.row for work in works if work.row is not None)
        if self.slots.free_start and rows[-1] - rows[0] == n - 1:
            return sorted(works, key=lambda work: work.row or 0)
        starts = range(len(self.owners) - n + 1) if self.slots.free_start else (0,)
        first = max(starts, key=lambda start: sum(start <= row < start + n for row in rows))
        places = [row for row in range(first, first + n) if row not in rows]
        outside = [row for row in rows if not first <= row < first + n]
        for a, b in zip(places, outside, strict=True):
            self.slots.exchange(a, b)
            self.owners[a], self.owners[b] = self.owners[b], self.owners[a]
            self._used[a], self._used[b] = self._used[b], self._used[a]
            for row in (a, b):
                owner = self.owners[row]
                if owner is not None:
                    owner.row = row
        return sorted(works, key=lambda work: work.row or 0)

    def _guarded(self, works: list[Work], run: Callable[[], Array]) -> Array | None:
        """Logits of a run; where it fails its requests end with the reason, and their rows are forgotten."""
        try:
            return run()
        except PeOnnxError as error:
            for work in works:
                if work.row is not None:
                    self.slots.cut(work.row, 0)
                self._end(work, Event(finish="error", message=str(error)))
            return None

    def _take(self, works: list[Work], logits: Array) -> None:
        """The next token of each request, by its row of logits ``[n, V]``."""
        best = logits.argmax(1).tolist()
        limit = self.slots.max_length
        for work, row, likely in zip(works, logits, best, strict=True):
            try:
                token = likely if work.plain and np.isfinite(row[likely]) else _drawn(work, row)
            except PeOnnxError as error:
                self._end(work, Event(finish="error", message=str(error)))
                continue
            work.new.append(token)
            assert work.row is not None
            full = limit is not None and self.slots.lengths[work.row] >= limit
            finish = "stop" if token in work.ends else "length" if full or work.left < 1 else None
            event = Event(token, _likelihoods(row, token, work.top_logprobs), finish)
            if finish:
                self._end(work, event)
            else:
                self.deliver(work, event)


def _drawn(work: Work, logits: Array) -> int:
    """The token that a request's options choose from logits ``[V]``."""
    if work.bias or work.presence_penalty or work.frequency_penalty:
        logits = logits.astype(np.float64)
        if work.new and (work.presence_penalty or work.frequency_penalty):
            tokens, counts = np.unique(work.new, return_counts=True)
            logits[tokens] -= work.presence_penalty + work.frequency_penalty * counts
        for token, bias in work.bias.items():
            logits[token] += bias
        logits = logits.astype(np.float32)
    return work.sampler.draw(work.choice, logits, [*work.prompt, *work.new])


def _likelihoods(logits: Array, token: int, top: int | None) -> Likelihoods | None:
    if top is None:
        return None
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    likely = np.argpartition(-values, min(top, len(values) - 1))[:top] if top else np.zeros(0, np.int64)
    ordered = sorted(likely.tolist(), key=lambda i: (-values[i], i))
    return Likelihoods(float(values[token]), [(i, float(values[i])) for i in ordered])
