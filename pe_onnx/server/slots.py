"""The rows of a server's cache: prompts fill them one by one, steps take those that generate, in one run.

A run reads rows that lie side by side, so that rows which generate are kept together by exchanging their content with
others. A row keeps what it holds when its request has ended: a later prompt that begins with the same tokens takes that
beginning over, in place or by a copy, which is much quicker than computing it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pe_onnx.cached_rows import Array
from pe_onnx.kv_cache import InPlaceCache
from pe_onnx.reordering import common_prefix
from pe_onnx.session import Session


class Slots(InPlaceCache):
    """``rows`` slots of ``max_length`` tokens each. Target ``ort``, and no encoder.

    On the CPU memory is taken as slots fill, not before. Raises what ``InPlaceCache`` raises.
    """

    def __init__(self, session: Session, rows: int, max_length: int | None = None) -> None:
        super().__init__(session, rows, max_length)
        bundle = session.bundle
        self.alone = bundle.path_dependent
        """Whether rows must not share a run: their frequencies follow the longest row of the batch."""
        self.shares = not bundle.path_dependent and not any(bundle.windows)
        """Whether a row's beginning is the same whatever came behind it, and can be copied."""
        self.reserve(self.max_length or self.capacity)

    def next_chunk(self, row: int) -> int:
        """Tokens of a prompt that the next ``fill_row`` may take at most."""
        return self._chunk_after(int(self.lengths[row]))

    def fill_row(self, row: int, tokens: Sequence[int]) -> Array:
        """Append tokens to a row in one run, at most ``next_chunk`` of them; logits ``[V]`` of the last, valid
        until the next run. Raises InputError for an id out of range or a row that grows too long."""
        ids = self._checked(tokens, int(self.lengths[row]))
        logits = self._run(ids[None], row, self.lengths[row : row + 1] + ids.size)
        self.lengths[row] += ids.size
        self.tokens[row].extend(ids.tolist())
        result: Array = logits[0, -1]
        return result

    def step(self, first: int, tokens: Sequence[int]) -> Array:
        """Append a token to each of the rows from ``first`` on; logits float32 ``[n, V]``, valid until the next run."""
        ids = np.asarray(tokens, np.int64)
        rows = slice(first, first + ids.size)
        self._check_length(int(self.lengths[rows].max()) + 1)
        held = self.lengths[rows]
        logits = self._step_rows(first, ids, held, held + 1, np.ones(ids.size, bool))
        self.lengths[rows] += 1
        for row, token in enumerate(ids.tolist(), first):
            self.tokens[row].append(token)
        return logits

    def in_common(self, row: int, prompt: list[int]) -> int:
        """Tokens of a prompt that need not be computed where it takes over a row's beginning; the last always is."""
        if self.alone:
            return 0
        n = min(common_prefix(self.tokens[row], prompt), len(prompt) - 1)
        return n if self._can_keep(row, n) else 0

    def cut(self, row: int, tokens: int) -> None:
        """Forget what a row holds behind its first tokens."""
        lengths = self.lengths.copy()
        lengths[row] = tokens
        self.truncate(lengths)

    def copy_beginning(self, source: int, row: int, tokens: int) -> None:
        """Make a row the first tokens of another; only where ``shares``."""
        for buffer in self.buffers:
            buffer.copy_block(row, 0, buffer, source, 0, tokens)
        self.lengths[row] = tokens
        self.tokens[row] = self.tokens[source][:tokens]

    def exchange(self, a: int, b: int) -> None:
        """Each becomes what the other was."""
        parents = np.arange(self.batch_size)
        parents[[a, b]] = b, a
        self.reorder(parents)

    @property
    def free_start(self) -> bool:
        """Whether a step may begin at any row: not where each place would be recorded as a CUDA graph of its own."""
        return self.session.not_captured is not None
