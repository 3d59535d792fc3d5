"""The first row and position of a parity mode that is not PyTorch's, and the runs of the graph up to there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pe_onnx import seq2seq_parity
from pe_onnx.bundle import ENCODER
from pe_onnx.cached_rows import Feed
from pe_onnx.errors import BundleError
from pe_onnx.parity import Comparison, compared_pairs

Array = np.ndarray[Any, Any]


@dataclass
class Failure:
    """Logits, or an encoder's output, that are not PyTorch's."""

    mode: str
    row: int
    position: int
    rows: list[int]
    """The rows of the parity check that the runs are of."""
    feeds: list[Feed]
    """What the graph was given, run by run."""
    expected: Array | None
    """The reference's logits ``[V]``; None of an encoder, and where onnxruntime refuses to run."""
    spread: float
    """Of the reference's values: what is allowed is relative to it."""
    file: str
    """Of the graph."""


def first_failure(compared: Comparison, mode: str) -> Failure | None:
    """Run a mode up to the first value that is off by more than is allowed; None where there is none.

    Of a beam search None: it is made of the decoder's steps, which other modes show.
    """
    if mode == seq2seq_parity.ENCODER:
        return _encoder_failure(compared)
    if mode == seq2seq_parity.BEAMS:
        return None
    spread, file = compared.expected.spread, compared.bundle.model.name
    noted = compared.open_cache.noted = []
    try:
        for pair, want in compared_pairs(compared, mode):
            if not np.abs(pair.logits - want).max() <= compared.allowed.error * spread:
                cache, rows = next((c, r) for c, r in noted if c is pair.cache)
                return Failure(mode, pair.row, pair.position, rows, list(cache.feeds or []), want, spread, file)
    except BundleError:  # onnxruntime refuses a run
        if not noted or not noted[-1][0].feeds:
            raise
        cache, rows = noted[-1]
        feeds = list(cache.feeds or [])
        slot = feeds[-1].row
        return Failure(mode, rows[slot], int(cache.lengths[slot]), rows, feeds, None, spread, file)
    finally:
        compared.open_cache.noted = None
    return None


def _encoder_failure(compared: Comparison) -> Failure | None:
    requests = compared.requests
    if requests is None:
        return None
    spread = requests.spread
    for case in requests.encoder_cases():
        hidden = requests.encode(case.ids, case.mask)
        for slot, row in enumerate(case.rows):
            held = case.mask[slot] != 0
            if not np.abs(hidden[slot, held] - case.want[slot, held]).max() <= compared.allowed.error * spread:
                feed = Feed(0, {"input_ids": case.ids, "attention_mask": case.mask}, case.mask != 0)
                mode, last = seq2seq_parity.ENCODER, int(held.sum()) - 1
                return Failure(mode, row, last, case.rows, [feed], None, spread, ENCODER)
    return None
