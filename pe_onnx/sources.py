"""The encoder's side of a batch: sources run through the encoder once, and the decoder's cross cache of each layer.

The decoder's first run over a row reads the encoder's output and fills the cross cache; later runs are bound to it.
Beams of one source have the same cross cache, so that reordering them leaves it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pe_onnx import contract
from pe_onnx.device_arrays import DeviceArray
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.memory import available_bytes
from pe_onnx.session import Session

Array = np.ndarray[Any, Any]

WORKING_TENSORS = 16
"""Tensors ``[B, S, C]`` that an encoder holds at once, at the most: its feed-forward layer is several times as wide."""


class Sources:
    """Encoded sources of a batch, and what the decoder has made of them."""

    def __init__(self, encoder: Session, decoder: Session, rows: Sequence[Sequence[int]]) -> None:
        """rows: token ids of each source. Raises InputError for an empty one, an id out of range, or more than fits
        into memory."""
        bundle, crossing = decoder.bundle, decoder.bundle.crossing
        if crossing is None:
            raise ConfigError("a source is for an encoder-decoder; this bundle is a decoder")
        ids, mask = _padded(rows, bundle.shape["vocab_size"])
        _check_memory(ids.shape, crossing, contract.storage_dtype(bundle.cache_dtype).itemsize)
        self.decoder = decoder
        self.crossing = crossing
        self.lengths = mask.sum(1)
        self.origin = np.arange(len(ids))
        """Which of the sources each row is over."""
        self.ready = np.zeros(len(ids), bool)
        """Of each row, whether its cross cache is filled."""
        self._mask = _filled(decoder, mask, "int64")
        self._hidden: DeviceArray | None = decoder.array((*ids.shape, crossing.width), bundle.cache_dtype)
        binding = encoder.binding()
        inputs = [_filled(encoder, ids, "int64"), _filled(encoder, mask, "int64")]
        for name, array in zip(("input_ids", "attention_mask"), inputs, strict=True):
            array.bind(binding, name)
        self._hidden.bind(binding, "last_hidden_state", output=True)
        encoder.run(binding)
        self._make(len(ids), ids.shape[1])

    def _make(self, rows: int, tokens: int) -> None:
        """Room for the cross cache of ``rows`` sources of ``tokens`` tokens."""
        dtype = self.decoder.bundle.cache_dtype
        layers = len(self.crossing.caches)
        pairs = [cache for cache in self.crossing.caches for _ in ("key", "value")]
        self.buffers = [self.decoder.array((rows, K, tokens, D), dtype) for K, D in pairs]
        self._none = [self.decoder.array((rows, K, 0, D), dtype) for K, D in pairs]
        self._no_hidden = self.decoder.array((rows, 0, self.crossing.width), dtype)
        self._past = contract.past_names(layers, "encoder.")
        self._present = contract.present_names(layers, "encoder.")

    @property
    def nbytes(self) -> int:
        """Bytes of the cross cache."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def bind(self, binding: Any, row: int, rows: int) -> None:
        """Bind what a run over rows ``row .. row + rows - 1`` needs; call ``ran`` after it."""
        self._mask.bind_rows(binding, "encoder_attention_mask", row, rows)
        if self.ready[row : row + rows].all():
            self._no_hidden.bind_rows(binding, "encoder_hidden_states", row, rows)
            for name, buffer in zip(self._past, self.buffers, strict=True):
                buffer.bind_rows(binding, name, row, rows)
            return
        assert self._hidden is not None
        self._hidden.bind_rows(binding, "encoder_hidden_states", row, rows)
        for past, present, none, buffer in zip(self._past, self._present, self._none, self.buffers, strict=True):
            none.bind_rows(binding, past, row, rows)
            buffer.bind_rows(binding, present, row, rows, output=True)

    def ran(self, row: int, rows: int) -> bool:
        """Note that a run filled the rows' cross cache; whether that is news."""
        news = not self.ready[row : row + rows].all()
        self.ready[row : row + rows] = True
        if self.ready.all():
            self._hidden = None
        return news

    def take(self, parents: Array) -> bool:
        """Make row b what row ``parents[b]`` was; whether any row got another source."""
        if len(parents) == len(self.origin) and (self.origin[parents] == self.origin).all():
            return False
        self.origin, self.ready, self.lengths = (x[parents] for x in (self.origin, self.ready, self.lengths))
        mask, hidden, held = self._mask, self._hidden, self.buffers
        dtype = self.decoder.bundle.cache_dtype
        self._mask = _filled(self.decoder, mask.host[parents], "int64")
        self._hidden = hidden and _filled(self.decoder, hidden.download()[parents], dtype)
        self._make(*self._mask.shape)
        if self.ready.any():
            for i, buffer in enumerate(held):
                self.buffers[i] = _filled(self.decoder, buffer.download()[parents], dtype)
        return True


def _padded(rows: Sequence[Sequence[int]], vocab_size: int) -> tuple[Array, Array]:
    """Ids and mask, int64 ``[B, S]``, padded on the right."""
    longest = max((len(row) for row in rows), default=0)
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        if not len(row):
            raise InputError("a source has no tokens; give at least one")
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} must be in 0..{vocab_size - 1}")
    return ids, mask


def _check_memory(shape: tuple[int, ...], crossing: contract.Crossing, itemsize: int) -> None:
    """Raises InputError where encoder and cross cache would take more than there is."""
    B, S = shape
    cache = 2 * sum(K * D for K, D in crossing.caches)
    needed = B * S * itemsize * (cache + WORKING_TENSORS * crossing.width)
    free = available_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{B} x {S} source tokens take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give a "
            f"shorter source or fewer at once"
        )


def _filled(session: Session, values: Array, dtype: str) -> DeviceArray:
    array = session.array(values.shape, dtype)
    array.host[...] = values
    array.upload()
    return array
