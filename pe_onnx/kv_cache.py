"""KV caches: they own the keys, the values and the position of every row, and run the session on them.

Two verbs: ``prefill`` appends prompts, ``decode`` one token a row. ``InPlaceCache`` serves the ``ort`` target: its
buffers ``[B, K, capacity, D]`` are bound once as past and present, and a step writes one slot. ``GrowingCache`` serves
the ``portable`` target: every step returns a longer cache.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from pe_onnx import contract
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.session import DeviceArray, Session

Tokens = Sequence[int]
Array = np.ndarray[Any, Any]

CHUNK_TOKENS = 256
"""Prompt tokens of one run: enough to fill the cores."""

LEAST_CHUNK_TOKENS = 64
"""Fewer leave the cores idle."""

SCORE_BYTES = 16 << 20
"""Of one tensor [H, T, S], the scores or their bias, where a run holds such: the longer S, the fewer tokens T."""

Path = list[dict[int, Array]]
"""Runs of the graph in order; each maps the rows that took part to the tokens int64 ``[n]`` they appended."""

FIRST_CAPACITY = 256
"""Slots of a new in-place cache; it doubles when it is full."""


class KVCache(ABC):
    """The cache of ``batch_size`` rows. ``lengths``: int64 ``[B]``, the tokens each row holds.

    max_length: tokens a row may hold; default the trained length. chunk_tokens: prompt tokens of one run; default
    CHUNK_TOKENS, fewer where tensors [H, T, S] would outgrow SCORE_BYTES, or the whole prompt where the encoding's
    frequencies depend on how far a run reaches. Raises ConfigError for more than the encoding takes.
    """

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        bundle = session.bundle
        self.score_heads = 0 if chunk_tokens or bundle.path_dependent else bundle.score_heads
        if chunk_tokens is None:
            chunk_tokens = sys.maxsize if bundle.path_dependent else CHUNK_TOKENS
        hard = bundle.max_length
        if max_length is not None and hard is not None and max_length > hard:
            raise ConfigError(f"max_length = {max_length} is more than the {hard} positions of the encoding")
        if batch_size < 1 or chunk_tokens < 1 or (max_length is not None and max_length < 1):
            raise ConfigError(
                f"batch_size = {batch_size}, chunk_tokens = {chunk_tokens} and max_length = {max_length} must be at "
                f"least 1"
            )
        self.session = session
        self.batch_size = batch_size
        self.chunk_tokens = chunk_tokens
        self.max_length = max_length or bundle.trained_length or hard
        self.vocab_size = bundle.shape["vocab_size"]
        self.layers = len(bundle.caches)
        self.past_names = contract.past_names(self.layers)
        self.present_names = contract.present_names(self.layers)
        self.lengths = np.zeros(batch_size, np.int64)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        """What each row holds."""
        self.path: Path | None = None
        """Where a list is put here, each run of the graph is noted in it."""

    def prefill(self, rows: Sequence[Tokens], all_logits: bool = False) -> list[Array]:
        """Append each row's tokens, in chunks; at least one token a row.

        Returns for each row float32 ``[V]``, the logits of its last token; with ``all_logits`` ``[tokens, V]``, for
        bundles exported with logits ``all``. Raises InputError for an id out of range or a row that grows too long.
        """
        if len(rows) != self.batch_size:
            raise InputError(f"{len(rows)} prompts for a cache of {self.batch_size} rows")
        if all_logits and self.session.bundle.logits != "all":
            raise ConfigError("the bundle gives the logits of the last token; export it with --logits all")
        arrays = [self._checked(row, int(length)) for row, length in zip(rows, self.lengths, strict=True)]
        logits = self._prefill(arrays, all_logits)
        for held, row in zip(self.tokens, arrays, strict=True):
            held.extend(row.tolist())
        return logits

    def decode(self, tokens: Sequence[int] | Array, active: Array | None = None) -> Array:
        """Append one token a row and return the logits, float32 ``[B, V]``, valid until the next call.

        active: bool ``[B]``; a row that is not keeps its length, and its logits mean nothing.
        """
        ids = _as_ids(tokens)
        if ids.size != self.batch_size:
            raise InputError(f"{ids.size} tokens for a cache of {self.batch_size} rows")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InputError(f"token id {_first_outside(ids, self.vocab_size)} must be in 0..{self.vocab_size - 1}")
        moving = np.ones(self.batch_size, bool) if active is None else active
        self._check_length(int(self.lengths.max(initial=0, where=moving)) + 1)
        logits = self._decode(ids, moving)
        self.lengths += moving
        for b in np.flatnonzero(moving):
            self.tokens[b].append(int(ids[b]))
        return logits

    def reserve(self, tokens: int) -> None:  # noqa: B027
        """Make room for ``tokens`` a row ahead of time, where the cache is preallocated."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held."""

    @abstractmethod
    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]: ...

    @abstractmethod
    def _decode(self, ids: Array, moving: Array) -> Array: ...

    def _chunk_after(self, past: int, rows: int = 1) -> int:
        """Tokens of the next run of a prompt, in ``rows`` rows behind ``past`` tokens."""
        if not self.score_heads:
            return self.chunk_tokens
        fitting = SCORE_BYTES // (4 * rows * self.score_heads * (past + self.chunk_tokens))
        return min(self.chunk_tokens, max(fitting, LEAST_CHUNK_TOKENS))

    def _checked(self, row: Tokens, length: int) -> Array:
        ids = _as_ids(row)
        if ids.size == 0:
            raise InputError("a prompt has no tokens; give at least one")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InputError(f"token id {_first_outside(ids, self.vocab_size)} must be in 0..{self.vocab_size - 1}")
        self._check_length(length + ids.size)
        return ids

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            hard = self.session.bundle.max_length
            if hard is not None and self.max_length >= hard:
                raise InputError(f"{length} tokens are more than the {hard} positions of the encoding")
            raise InputError(
                f"{length} tokens are more than max_length = {self.max_length}; give a greater --max-length"
            )


class InPlaceCache(KVCache):
    """Compact rows in buffers that past and present share. Rows may differ in length."""

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(session, batch_size, max_length, chunk_tokens)
        self.capacity = 0
        self.buffers: list[DeviceArray] = []
        rows = (batch_size, 1)
        self._ids, self._positions = session.array(rows, np.int64), session.array(rows, np.int64)
        self._logits = session.array((batch_size, 1, self.vocab_size), np.float32)
        self.reserve(min(FIRST_CAPACITY, self.max_length or FIRST_CAPACITY))

    @property
    def nbytes(self) -> int:
        return sum(buffer.host.nbytes for buffer in self.buffers)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` a row, at least doubling, so that growth copies each token about once."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, 2 * self.capacity)
        if self.max_length is not None:
            capacity = min(capacity, max(tokens, self.max_length))
        B, caches = self.batch_size, self.session.bundle.caches
        filled = int(self.lengths.max(initial=0))
        for i in range(2 * self.layers):  # one buffer at a time: never two whole caches
            K, D = caches[i // 2]
            grown = self.session.array((B, K, capacity, D), self.session.bundle.cache_dtype)
            if filled:
                grown.host[:, :, :filled] = self.buffers[i].download()[:, :, :filled]
                grown.upload()
            if i < len(self.buffers):
                self.buffers[i] = grown
            else:
                self.buffers.append(grown)
        self.capacity = capacity
        self._mask = self.session.array((B * capacity,), np.int64)
        self._step = self.session.binding()
        self._ids.bind(self._step, "input_ids")
        self._positions.bind(self._step, "position_ids")
        self._logits.bind(self._step, "logits", output=True)
        self._bind_cache(self._step, 0, B)

    def _bind_cache(self, binding: Any, row: int, rows: int) -> None:
        """Bind rows ``row .. row + rows - 1`` of every buffer as past and present at once."""
        for buffer, past, present in zip(self.buffers, self.past_names, self.present_names, strict=True):
            _, K, capacity, D = buffer.shape  # layers may differ in K and D
            shape, offset = (rows, K, capacity, D), row * K * capacity * D
            buffer.bind(binding, past, shape=shape, offset=offset)
            buffer.bind(binding, present, output=True, shape=shape, offset=offset)

    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]:
        longest = max(row.size for row in rows)
        self.reserve(int(max(length + row.size for length, row in zip(self.lengths, rows, strict=True))))
        if not self.lengths.any() and longest <= self.chunk_tokens:
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
            parts = []
            while row.size:
                chunk, row = np.split(row, [self._chunk_after(int(self.lengths[b]))])
                logits = self._run(chunk[None], b, self.lengths[b : b + 1] + chunk.size)
                self.lengths[b] += chunk.size
                parts.append(logits[0] if all_logits else logits[0, -1:])
            result.append(np.concatenate(parts) if all_logits else parts[-1][0])
        return result

    def _run(self, ids: Array, row: int, lengths: Array) -> Array:
        """Tokens ``[b, T]`` for rows from ``row`` on, which hold ``lengths`` tokens after it."""
        b, T = ids.shape
        total = int(lengths.max())
        if self.path is not None:
            counts = lengths - self.lengths[row : row + b]
            self.path.append({row + i: ids[i, :n].copy() for i, n in enumerate(counts)})
        start = np.maximum(lengths - T, 0)
        mask = (np.arange(total) < lengths[:, None]).astype(np.int64)
        positions = np.minimum(start[:, None] + np.arange(T), lengths[:, None] - 1)
        binding = self.session.binding()
        held = []
        for name, values in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            array = self.session.array(values.shape, np.int64)
            array.host[...] = values
            array.upload()
            array.bind(binding, name)
            held.append(array)
        tokens = T if self.session.bundle.logits == "all" else 1
        logits = self.session.array((b, tokens, self.vocab_size), np.float32)
        logits.bind(binding, "logits", output=True)
        self._bind_cache(binding, row, b)
        self.session.run(binding)
        return logits.download()

    def _decode(self, ids: Array, moving: Array) -> Array:
        if self.path is not None:
            self.path.append({int(b): ids[b : b + 1].copy() for b in np.flatnonzero(moving)})
        # a row that does not move overwrites the slot behind its last token; where none is left, its last token again
        hard = self.session.bundle.max_length
        full = ~moving & (hard is not None and self.lengths >= hard)
        ids = np.where(full, [held[-1] if held else 0 for held in self.tokens], ids)
        lengths = self.lengths + ~full
        total = int(lengths.max())
        self.reserve(total)
        self._ids.host[:, 0] = ids
        self._positions.host[:, 0] = np.where(moving, self.lengths, np.maximum(self.lengths - 1, 0))
        mask = self._mask.host[: self.batch_size * total].reshape(self.batch_size, total)
        np.less(np.arange(total), lengths[:, None], out=mask, casting="unsafe")
        for array in (self._ids, self._positions, self._mask):
            array.upload()
        self._mask.bind(self._step, "attention_mask", shape=(self.batch_size, total))
        self.session.run(self._step)
        return self._logits.download()[:, 0]


class GrowingCache(KVCache):
    """A cache that onnxruntime returns one step longer each time. Rows are padded on the left."""

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(session, batch_size, max_length, chunk_tokens)
        dtype = session.bundle.cache_dtype
        self._past = [session.empty((batch_size, K, 0, D), dtype) for K, D in session.bundle.caches for _ in range(2)]
        self.mask = np.zeros((batch_size, 0), np.int64)

    @property
    def nbytes(self) -> int:
        return self.mask.size * self.session.bundle.cache_bytes_per_token

    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]:
        longest = max(row.size for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        valid = np.zeros((len(rows), longest), np.int64)
        for b, row in enumerate(rows):
            ids[b, longest - row.size :] = row
            valid[b, longest - row.size :] = 1
        parts, begin = [], 0
        while begin < longest:
            end = begin + self._chunk_after(self.mask.shape[1], len(rows))
            logits = self.run(ids[:, begin:end], valid[:, begin:end])
            begin = end
            parts.append(logits if all_logits else logits[:, -1:])
        if all_logits:
            whole = np.concatenate(parts, 1)
            return [whole[b, longest - row.size :] for b, row in enumerate(rows)]
        return list(parts[-1][:, 0])

    def _decode(self, ids: Array, moving: Array) -> Array:
        return self._append(ids[:, None], moving.astype(np.int64)[:, None])[:, -1]

    def run(self, ids: Array, valid: Array) -> Array:
        """Append a block of tokens ``[B, T]`` with any zeros in ``valid``; logits ``[B, T or 1, V]``."""
        logits = self._append(ids, valid)
        self.lengths += valid.sum(1)
        return logits

    def _append(self, ids: Array, valid: Array) -> Array:
        if self.path is not None:
            self.path.append({b: ids[b, valid[b] != 0] for b in range(len(ids)) if valid[b].any()})
        self.mask = np.concatenate((self.mask, valid), 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        binding = self.session.binding()
        for name, values in (("input_ids", ids), ("attention_mask", self.mask), ("position_ids", positions)):
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name, value in zip(self.past_names, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self.present_names:
            binding.bind_output(name, self.session.device)
        self.session.run(binding)
        logits, *self._past = binding.get_outputs()
        return logits.numpy()


def make_cache(
    session: Session, batch_size: int = 1, max_length: int | None = None, chunk_tokens: int | None = None
) -> KVCache:
    """The cache that the bundle's target takes."""
    kinds: dict[str, type[KVCache]] = {"ort": InPlaceCache, "portable": GrowingCache}
    return kinds[session.bundle.target](session, batch_size, max_length, chunk_tokens)


def _as_ids(tokens: Tokens | Array) -> Array:
    """int64 ``[n]``. Raises InputError for what is no list of integers of 64 bits."""
    try:
        if np.asarray(tokens).dtype.kind == "f" and len(tokens):
            raise ValueError
        return np.asarray(tokens, np.int64).reshape(-1)
    except (OverflowError, ValueError, TypeError):
        wrong = next((t for t in tokens if not isinstance(t, int) or not -(2**63) <= t < 2**63), tokens)
        raise InputError(f"token id {wrong!r} must be an integer of 64 bits") from None


def _first_outside(ids: Array, vocab_size: int) -> int:
    return int(ids[(ids < 0) | (ids >= vocab_size)][0])
