"""The cache of the ``portable`` target: every step returns a longer one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pe_onnx import contract
from pe_onnx.cached_rows import Array, KVCache
from pe_onnx.session import Session
from pe_onnx.sources import Sources


class GrowingCache(KVCache):
    """A cache that onnxruntime returns one step longer each time. Rows are padded on the left."""

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        sources: Sources | None = None,
    ) -> None:
        super().__init__(session, batch_size, max_length, chunk_tokens, sources)
        shapes = [(batch_size, K, 0, D) for K, D in session.caches for _ in range(2)]
        self._past = [self._value(np.zeros(shape, contract.storage_dtype(self.dtype))) for shape in shapes]
        self.mask = np.zeros((batch_size, 0), np.int64)

    @property
    def nbytes(self) -> int:
        return self.mask.size * self.session.cache_bytes_per_token

    def _fill(self, tokens: int, rng: np.random.Generator) -> Callable[[], None]:
        B, filled = self.batch_size, []
        for K, D in (cache for cache in self.session.caches for _ in range(2)):
            values = rng.standard_normal((B, K, tokens, D), np.float32)
            filled.append(self._value(contract.stored(values, self.dtype)))
        mask = np.ones((B, tokens), np.int64)

        def put_back() -> None:
            self._past, self.mask = list(filled), mask

        return put_back

    def _value(self, values: Array) -> Any:
        """An OrtValue of keys or values ``[B, K, S, D]`` on the session's device."""
        return self.session.value(values, self.dtype)

    def _take_rows(self, parents: Array) -> int:
        if np.array_equal(parents, np.arange(self.batch_size)):
            return 0
        self.mask = self.mask[parents]
        for i, past in enumerate(self._past):
            self._past[i] = self._value(self.session.host(past, self.dtype)[parents])
        return self.nbytes

    def _truncate(self, lengths: Array) -> None:
        cut = ([row[:, :n] for row, n in zip(self._held(i), lengths, strict=True)] for i in range(2 * self.layers))
        self._hold(lengths, cut)

    def _held(self, i: int) -> list[Array]:
        return [
            row[:, valid]
            for row, valid in zip(self.session.host(self._past[i], self.dtype), self.mask != 0, strict=True)
        ]

    def _hold(self, lengths: Array, held: Iterable[list[Array]]) -> None:
        longest = int(lengths.max())
        past: list[Any] = []
        for old, rows in zip(self._past, held, strict=True):
            _, K, _, D = old.shape()
            padded = np.zeros((self.batch_size, K, longest, D), contract.storage_dtype(self.dtype))
            for row, values, n in zip(padded, rows, lengths, strict=True):
                row[:, longest - n :] = values
            past.append(self._value(padded))
        self._past = past
        self.mask = (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)

    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]:
        longest = max(row.size for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        valid = np.zeros((len(rows), longest), np.int64)
        for b, row in enumerate(rows):
            ids[b, longest - row.size :] = row
            valid[b, longest - row.size :] = 1
        parts: list[Array] = []
        begin = 0
        while begin < longest:
            end = begin + self._chunk_after(self.mask.shape[1], len(rows))
            logits = self.run(ids[:, begin:end], valid[:, begin:end])
            begin = end
            parts = [*parts, logits] if all_logits else [logits[:, -1:].copy()]
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
        self.mask = np.concatenate((self.mask, valid), 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        self._note(0, ids, self.mask, positions, valid != 0)
        session = self.session.for_tokens(ids.size)
        binding = session.binding()
        for name, values in (("input_ids", ids), ("attention_mask", self.mask), ("position_ids", positions)):
            if name in self.session.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name, value in zip(self.past_names, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self.present_names:
            binding.bind_output(name, *self.session.device)
        if self.sources is not None:
            self.sources.bind(binding, 0, len(ids))
        session.run(binding)
        if self.sources is not None:
            self.sources.ran(0, len(ids))
        logits, *self._past = binding.get_outputs()[: 1 + len(self.present_names)]
        return logits.numpy()
