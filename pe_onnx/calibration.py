"""The scales of an int8 cache, from what keys and values are on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pe_onnx.bundle import Bundle
from pe_onnx.kv_cache import InPlaceCache
from pe_onnx.session import Session
from pe_onnx.tokenizer import load_tokenizer

TEXT = Path(__file__).with_name("calibration.txt")
"""Prose, a dialogue, code, figures and a table, written for this."""

TOKENS = 512
"""Of the text."""

HEADROOM = 1.1
"""What is greater than this many times the greatest value that was seen is cut off."""


def scales_of(bundle: Bundle) -> list[tuple[Any, Any]]:
    """For each layer of a bundle of target ``ort`` a scale for each channel of each head, of keys and of values.

    float32 ``[K*D]`` twice: the greatest magnitude over the tokens of a text, with some room, as 127. A channel that
    was 0 throughout has the scale of the layer's greatest.
    """
    tokens = calibration_tokens(bundle)
    cache = InPlaceCache(Session(bundle), 1, len(tokens))
    cache.prefill([tokens])
    made = []
    for buffer in cache.buffers:
        values = np.abs(buffer.download()[0, :, : len(tokens)]).max(1)  # [K, D]
        values = np.where(values > 0, values, values.max() or 1.0)
        made.append((values.reshape(-1) * (HEADROOM / 127)).astype(np.float32))
    return list(zip(made[0::2], made[1::2], strict=True))


def calibration_tokens(bundle: Bundle) -> list[int]:
    """Of a text where the bundle has a tokenizer, else random ones; at most TOKENS, and no more than it can take."""
    limit = min(TOKENS, bundle.trained_length or TOKENS, bundle.max_length or TOKENS)
    if bundle.manifest["tokenizer"] is not None:
        tokens = load_tokenizer(bundle.folder, bundle.manifest["tokenizer"]).encode(TEXT.read_text("utf-8"))
        return [int(token) for token in tokens[:limit]]
    return np.random.default_rng(0).integers(0, bundle.shape["vocab_size"], limit).tolist()
