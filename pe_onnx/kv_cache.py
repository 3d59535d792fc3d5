"""KV caches: they own the keys, the values and the position of every row, and run the session on them.

``InPlaceCache`` serves the ``ort`` target: its buffers ``[B, K, capacity, D]`` are bound once as past and present, and
a step writes one slot. ``GrowingCache`` (growing_cache.py) serves the ``portable`` target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pe_onnx import contract
from pe_onnx.cached_rows import Array, KVCache, Path
from pe_onnx.device_arrays import DeviceArray
from pe_onnx.growing_cache import GrowingCache
from pe_onnx.position_channels import widened
from pe_onnx.reordering import common_prefix, reorder_rows
from pe_onnx.session import Session
from pe_onnx.sources import Sources

__all__ = ["GrowingCache", "InPlaceCache", "KVCache", "Path", "make_cache"]

FIRST_CAPACITY = 256
"""Slots of a new in-place cache; it doubles when it is full."""

LEAST_RECORDED = 256
"""Slots by which the masks of recorded steps differ at least."""

FILLED_TOKENS = 1024
"""Of a cache that is filled for measuring, tokens whose values are drawn; they are repeated."""

WINDOW_SLACK = 256
"""Slots beyond the window, or as many again where that is less: onnxruntime moves the window to the front each time
they are full, and so far a row can be cut back."""


class InPlaceCache(KVCache):
    """Compact rows in buffers that past and present share. Rows may differ in length."""

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        sources: Sources | None = None,
    ) -> None:
        super().__init__(session, batch_size, max_length, chunk_tokens, sources)
        self.capacity = 0
        self.windows = session.bundle.windows
        self.buffers: list[DeviceArray] = []
        self.reserve(min(FIRST_CAPACITY, self.max_length or FIRST_CAPACITY))

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` a row: exactly of an empty cache, else at least doubling, so that growth copies each
        token about once."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, 2 * self.capacity) if self.lengths.any() else tokens
        if self.max_length is not None:
            capacity = min(capacity, max(tokens, self.max_length))
        self._allocate(np.arange(self.batch_size), capacity)

    def _slots(self, layer: int, capacity: int) -> int:
        """Of a layer's buffers."""
        return ring_slots(self.windows[layer]) if self.windows[layer] else capacity

    def _resident(self, layer: int, tokens: int) -> int:
        """Of a row of so many tokens those that a layer holds, from its first slot on (passes/window_cache.py)."""
        slots, window = self._slots(layer, tokens), self.windows[layer]
        if tokens <= slots:
            return tokens
        freed = slots - window + 1
        return tokens - freed * -(-(tokens - slots) // freed)

    def _allocate(self, parents: Array, capacity: int) -> None:
        """New buffers of ``capacity`` slots, row b with what row ``parents[b]`` holds, and all bound."""
        B, caches = len(parents), self.session.caches
        for i in range(2 * self.layers):  # one buffer at a time: never two whole caches
            K, D = caches[i // 2]
            if self.windows[i // 2] and self.capacity and np.array_equal(parents, np.arange(self.batch_size)):
                continue  # it does not grow
            grown = self.session.array((B, K, self._slots(i // 2, capacity), D), self.dtype)
            for b, parent in enumerate(parents) if self.lengths.any() else ():
                n = self._resident(i // 2, int(self.lengths[parent]))
                grown.copy_block(b, 0, self.buffers[i], int(parent), 0, n)
            if i < len(self.buffers):
                self.buffers[i] = grown
            else:
                self.buffers.append(grown)
        self.capacity = capacity
        self._ids, self._positions, self._logits, self._mask = (
            self.session.array(shape, dtype, pinned=True)
            for shape, dtype in (
                ((B, 1), "int64"),
                ((B, 1), "int64"),
                ((B, 1, self.vocab_size), "float32"),
                ((B * capacity,), "int64"),
            )
        )
        self._bind()

    def _bind(self) -> None:
        self._recorded: dict[tuple[int, int, int], int] = {}
        """CUDA graphs of steps by their first row, their rows and their mask's length."""
        self._steps: dict[tuple[int, int], Any] = {}
        """What steps are bound to, by their first row and their rows."""

    def _bound_step(self, row: int, rows: int) -> Any:
        """The binding of a step of rows ``row .. row + rows - 1``; only the mask is bound to it each time."""
        if (row, rows) in self._steps:
            return self._steps[row, rows]
        step = self._steps[row, rows] = self.session.binding()
        self._ids.bind_rows(step, "input_ids", 0, rows)
        if "position_ids" in self.session.inputs:
            self._positions.bind_rows(step, "position_ids", 0, rows)
        self._logits.bind_rows(step, "logits", 0, rows, output=True)
        self._bind_cache(step, row, rows)
        return step

    def _fill(self, tokens: int, rng: np.random.Generator) -> Callable[[], None]:
        self.reserve(tokens)
        for i, buffer in enumerate(self.buffers):
            (_, K, _, D), n = buffer.shape, self._resident(i // 2, tokens)
            few = contract.stored(rng.standard_normal((K, min(n, FILLED_TOKENS), D), np.float32), self.dtype)
            values = np.tile(few, (1, -(-n // few.shape[1]), 1))[:, :n]
            for b in range(self.batch_size):
                buffer.put_block(b, 0, values)
        return lambda: None  # a step writes behind them

    def _take_rows(self, parents: Array) -> int:
        if len(parents) != self.batch_size:
            self._allocate(parents, self.capacity)
            return self.nbytes
        first = {b: self._first_difference(b, p) for b, p in enumerate(parents) if b != p}
        moved = 0
        for window in set(self.windows) if first else ():
            layers = [layer for layer in range(self.layers) if self.windows[layer] == window]
            slots = {b: self._slots_from(layers[0], b, parents[b], token) for b, token in first.items()}
            buffers = [self.buffers[i] for layer in layers for i in (2 * layer, 2 * layer + 1)]
            moved += reorder_rows(buffers, parents.tolist(), slots)
        return moved

    def _slots_from(self, layer: int, b: int, parent: int, token: int) -> slice:
        """Those of ``parent`` that hold its tokens from ``token`` on, or all where b holds others in the same slots."""
        resident = self._resident(layer, int(self.lengths[parent]))
        if self.windows[layer] and self.lengths[b] != self.lengths[parent]:
            return slice(0, resident)
        return slice(max(token - (int(self.lengths[parent]) - resident), 0), resident)

    def _can_keep(self, b: int, tokens: int) -> bool:
        held = int(self.lengths[b])
        gone = ((held - self._resident(layer, held), window) for layer, window in enumerate(self.windows) if window)
        return super()._can_keep(b, tokens) and all(
            tokens == 0 or first <= max(tokens - window + 1, 0) for first, window in gone
        )

    def _truncate(self, lengths: Array) -> None:
        # slots behind a row's length are never read, and the next token overwrites the first of them
        for layer, window in enumerate(self.windows):
            for b, (n, held) in enumerate(zip(lengths.tolist(), self.lengths.tolist(), strict=True)):
                before, after = (t - self._resident(layer, t) for t in (held, n))  # the first token's position
                for buffer in self.buffers[2 * layer : 2 * layer + 2] if window and before > after and n else ():
                    buffer.put_block(b, before - after, buffer.block(b, 0, n - before).copy())

    def _held(self, i: int) -> list[Array]:
        size = self.session.bundle.caches[i // 2][1]  # positions that keys hold besides are known
        rows = enumerate(self.lengths.tolist())
        return [self.buffers[i].block(b, 0, self._resident(i // 2, n))[..., :size] for b, n in rows]

    def _hold(self, lengths: Array, held: Iterable[list[Array]]) -> None:
        self.reserve(int(lengths.max()))
        for i, (buffer, rows) in enumerate(zip(self.buffers, held, strict=True)):
            for b, (row, n) in enumerate(zip(rows, lengths.tolist(), strict=True)):
                resident = self._resident(i // 2, n)
                kept = min(row.shape[1], resident)  # of a window that was cut back there may be more, or fewer
                values, bits = row[:, row.shape[1] - kept :], self.session.position_bits
                if bits is not None:
                    positions = np.arange(n - kept, n) if i % 2 == 0 else None
                    values = widened(values, positions, bits, self.dtype)
                buffer.put_block(b, resident - kept, values)

    def _first_difference(self, a: int, b: int) -> int:
        """The slot up to which two rows hold the same keys and values."""
        if self.session.bundle.path_dependent:
            return 0  # keys depend on the runs that made them
        if self.sources is not None and self.sources.origin[a] != self.sources.origin[b]:
            return 0
        return common_prefix(self.tokens[a], self.tokens[b])

    def _bind_cache(self, binding: Any, row: int, rows: int) -> None:
        """Bind rows ``row .. row + rows - 1`` of every buffer as past and present at once."""
        for buffer, past, present in zip(self.buffers, self.past_names, self.present_names, strict=True):
            _, K, capacity, D = buffer.shape  # layers may differ in K and D
            shape, offset = (rows, K, capacity, D), row * K * capacity * D
            buffer.bind(binding, past, shape=shape, offset=offset)
            buffer.bind(binding, present, output=True, shape=shape, offset=offset)
        if self.sources is not None:
            self.sources.bind(binding, row, rows)

    def _run_bound(self, session: Session, binding: Any, row: int, rows: int, recorded: int | None = None) -> None:
        """Run rows that are bound; steps are bound anew where that filled their cross cache."""
        session.run(binding, recorded)
        if self.sources is not None and self.sources.ran(row, rows):
            self._bind()

    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]:
        longest = max(row.size for row in rows)
        self.reserve(int(max(length + row.size for length, row in zip(self.lengths, rows, strict=True))))
        ragged = len(rows) > 1 and (any(self.windows) or self._takes_even_rows(rows))
        if not self.lengths.any() and longest <= self.chunk_tokens and not ragged:
            sizes = np.array([row.size for row in rows])
            ids = np.zeros((len(rows), longest), np.int64)
            for b, row in enumerate(rows):
                ids[b, : row.size] = row
            logits = self._run(ids, 0, sizes)
            self.lengths[:] = sizes
            if self.session.bundle.logits == "last":
                return list(logits[:, 0])
            return [logits[b, :n] if all_logits else logits[b, n - 1] for b, n in enumerate(sizes)]
        result = []
        for b, row in enumerate(rows):  # several tokens on a filled cache: one row at a time
            parts: list[Array] = []
            while row.size:
                chunk, row = np.split(row, [self._chunk_after(int(self.lengths[b]))])
                logits = self._run(chunk[None], b, self.lengths[b : b + 1] + chunk.size)
                self.lengths[b] += chunk.size
                parts = [*parts, logits[0]] if all_logits else [logits[0, -1:].copy()]
            result.append(np.concatenate(parts) if all_logits else parts[-1][0])
        return result

    def _takes_even_rows(self, rows: list[Array]) -> bool:
        """Whether a run of prompts of different lengths would go wrong, besides buffers of a window, which refuse it:
        onnxruntime 1.31 on CUDA aligns the causal mask of a padded row with its end where there is a bias."""
        uneven = len({row.size for row in rows}) > 1
        return uneven and self.session.device.kind == "cuda" and self.session.score_heads > 0

    def _run(self, ids: Array, row: int, lengths: Array) -> Array:
        """Tokens ``[b, T]`` for rows from ``row`` on, which hold ``lengths`` tokens after it."""
        b, T = ids.shape
        total = int(lengths.max())
        start = np.maximum(lengths - T, 0)
        mask = (np.arange(total) < lengths[:, None]).astype(np.int64)
        positions = np.minimum(start[:, None] + np.arange(T), lengths[:, None] - 1)
        new = lengths - self.lengths[row : row + b]
        self._note(row, ids, mask, positions, np.arange(T) < new[:, None])
        session = self.session.for_tokens(ids.size)
        binding = session.binding()
        held = []
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, values in ((name, values) for name, values in named.items() if name in self.session.inputs):
            array = self.session.array(values.shape, "int64")
            array.host[...] = values
            array.upload()
            array.bind(binding, name)
            held.append(array)
        tokens = T if self.session.bundle.logits == "all" else 1
        logits = self.session.array((b, tokens, self.vocab_size), "float32")
        logits.bind(binding, "logits", output=True)
        self._bind_cache(binding, row, b)
        self._run_bound(session, binding, row, b)
        return logits.download()

    def _decode_moving(self, ids: Array, moving: Array) -> Array:
        """Rows that rest are left out: a token on top, taken back, would push others out of a window."""
        for b in np.flatnonzero(moving).tolist():
            self._logits.host[b] = self._run(ids[b : b + 1, None], b, self.lengths[b : b + 1] + 1)[0, -1:]
        return self._logits.host[:, 0]

    def _decode(self, ids: Array, moving: Array) -> Array:
        if any(self.windows) and not moving.all():
            self.reserve(int(self.lengths.max(where=moving, initial=0)) + 1)
            return self._decode_moving(ids, moving)
        # a row that does not move overwrites the slot behind its last token; where none is left, its last token again
        hard = self.session.max_length
        positions, lengths = self.lengths, self.lengths + 1
        if not moving.all():
            full = ~moving & (hard is not None and self.lengths >= hard)
            ids = np.where(full, [held[-1] if held else 0 for held in self.tokens], ids)
            positions, lengths = np.where(moving, positions, np.maximum(positions - 1, 0)), positions + ~full
        return self._step_rows(0, ids, positions, lengths, moving)

    def _step_rows(self, row: int, ids: Array, positions: Array, lengths: Array, moving: Array) -> Array:
        """A token for each of the rows from ``row`` on, at ``positions``; ``lengths`` are their masks'. All int64
        ``[n]``, moving bool ``[n]``; float32 ``[n, V]``, valid until the next step."""
        rows, total = len(ids), int(lengths.max())
        self.reserve(total)
        recorded = None
        if self.session.not_captured is None and not any(self.windows):
            total = recorded_length(total, self.capacity)
            key = row, rows, total
            recorded = self._recorded.get(key) or self._recorded.setdefault(key, self.session.new_graph())
        self._ids.host[:rows, 0] = ids
        self._positions.host[:rows, 0] = positions
        mask = self._mask.host[: rows * total].reshape(rows, total)
        np.less(np.arange(total), lengths[:, None], out=mask, casting="unsafe")
        self._note(row, self._ids.host[:rows], mask, self._positions.host[:rows], moving[:, None])
        self._ids.upload()
        self._positions.upload()
        self._mask.upload(mask.size)
        step = self._bound_step(row, rows)
        self._mask.bind(step, "attention_mask", shape=(rows, total))
        self._run_bound(self.session, step, row, rows, recorded)
        return self._logits.download()[:rows, 0]


def recorded_length(tokens: int, capacity: int) -> int:
    """The mask's length of the CUDA graph for a step of so many tokens: at most a quarter more, or LEAST_RECORDED,
    so that a graph serves many steps. Slots behind a row's length are masked."""
    step = max(LEAST_RECORDED, 1 << max((tokens - 1).bit_length() - 3, 0))
    return min(-(-tokens // step) * step, capacity)


def ring_slots(window: int) -> int:
    """Of the buffers of a layer that keeps its window alone."""
    return window + min(window, WINDOW_SLACK)


def make_cache(
    session: Session,
    batch_size: int = 1,
    max_length: int | None = None,
    chunk_tokens: int | None = None,
    sources: Sources | None = None,
) -> KVCache:
    """The cache that the bundle's target takes."""
    kinds: dict[str, type[KVCache]] = {"ort": InPlaceCache, "portable": GrowingCache}
    return kinds[session.bundle.target](session, batch_size, max_length, chunk_tokens, sources)
