"""Bits that a bundle needs for a text in windows of a length, by position: quality past the trained length.

A text's first tokens are cut into windows, each run from an empty cache, and the bits of a token are ``-log2 p`` of
what the bundle gave it, with the window's tokens before it to go by. A window's first token is given, not predicted.
Imports neither torch nor transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx.bundle import Bundle
from pe_onnx.errors import InputError
from pe_onnx.kv_cache import make_cache
from pe_onnx.session import Session
from pe_onnx.tokenizer import load_tokenizer

Array = np.ndarray[Any, Any]

PIECE_TOKENS = 256
"""Of a window those whose logits are held at once."""
STEP_ROWS = 16
"""Windows that run at once where the bundle gives the logits of the last token alone."""


class Text(NamedTuple):
    """A text in a bundle's tokens."""

    ids: list[int]
    sizes: Array
    """Bytes of UTF-8 of each, int64 ``[tokens]``: what it adds to the text of the one before it."""


def read_text(path: Path) -> str:
    """A file in UTF-8. Raises InputError for what cannot be read so."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read as UTF-8: {error}") from None


def tokenized(bundle: Bundle, text: str, tokens: int) -> Text:
    """The first ``tokens`` tokens of a text. Raises InputError where the bundle has no tokenizer."""
    held = bundle.manifest["tokenizer"]
    if held is None:
        raise InputError(f"bundle {bundle.folder} has no tokenizer, without which it cannot read a text")
    tokenizer = load_tokenizer(bundle.folder, held)
    ids = tokenizer.encode(text)[:tokens]
    if held["kind"] == "bytes":
        return Text(ids, np.ones(len(ids), np.int64))

    def size(*tokens: int) -> int:
        return len(tokenizer.decode(tokens).encode())

    # alone a token may lose the space before it, and with all those before it decoding takes the square of the text
    grown = [size(a, b) - size(a) for a, b in itertools.pairwise(ids)]
    return Text(ids, np.array([size(*ids[:1]), *grown][: len(ids)], np.int64))


def why_not(bundle: Bundle, length: int) -> str | None:
    """Why a bundle cannot run a text of ``length`` tokens at all; None where it can."""
    limit = bundle.max_length
    return None if limit is None or length <= limit else f"takes {limit:,} tokens at most"


def why_no_bits(bundle: Bundle) -> str | None:
    """Why the bits of a text cannot be had of a bundle; None where they can."""
    if bundle.manifest["tokenizer"] is None:
        return "has no tokenizer"
    if bundle.path_dependent and bundle.logits != "all":
        return "its logits depend on the runs, and it gives a run's last alone; export it with --logits all"
    return None


def window_bits(session: Session, ids: Sequence[int], length: int) -> Array:
    """Bits of each token of the text's windows of ``length`` tokens, float64 ``[windows, length]``; the first column,
    which is not predicted, is nan. What is left behind the last whole window is not run.

    A bundle that gives all logits runs windows one after the other, whole where its logits depend on the runs; one
    that gives the last alone runs some at a time, token by token, to the same figures. Raises InputError for a text
    shorter than a window, and what the cache raises for one too long.
    """
    windows = len(ids) // length
    if not windows:
        raise InputError(f"the text has {len(ids)} tokens, fewer than a window of {length}")
    rows = np.asarray(ids[: windows * length], np.int64).reshape(windows, length)
    bits = np.full(rows.shape, math.nan)
    size = 1 if session.bundle.logits == "all" else min(STEP_ROWS, windows)
    for begin in range(0, windows, size):
        part = rows[begin : begin + size]
        run = _whole if session.bundle.logits == "all" else _steps
        bits[begin : begin + size, 1:] = run(session, part)
    return bits


def _whole(session: Session, rows: Array) -> Array:
    """A row's bits ``[1, L - 1]``, in pieces behind one another."""
    (row,) = rows
    cache = make_cache(session, 1, len(row))
    cache.reserve(len(row))
    piece = len(row) if session.bundle.path_dependent else PIECE_TOKENS
    found = []
    for begin in range(0, len(row), piece):
        given = row[begin : begin + piece]
        (logits,) = cache.prefill([given.tolist()], all_logits=True)
        found.append(_bits(logits, row[begin + 1 : begin + 1 + len(given)]))
    return np.concatenate(found)[None]


def _steps(session: Session, rows: Array) -> Array:
    """Bits of several rows ``[B, L - 1]``, token by token."""
    cache = make_cache(session, len(rows), rows.shape[1])
    cache.reserve(rows.shape[1])
    found = np.empty((len(rows), rows.shape[1] - 1))
    for i in range(rows.shape[1] - 1):
        found[:, i] = _bits(cache.decode(rows[:, i]), rows[:, i + 1])
    return found


def _bits(logits: Array, targets: Array) -> Array:
    """``-log2 p`` of targets int64 ``[n]`` under the first n of logits ``[m, V]``."""
    logs = log_softmax(logits[: len(targets)])
    return -logs[np.arange(len(targets)), targets] / math.log(2)


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def counted(tokens: int, lengths: Sequence[int]) -> Array:
    """Which of a text's tokens are predicted in windows of every one of the lengths, bool ``[tokens]``: on these,
    whatever the window, lengths compare."""
    everywhere = np.ones(tokens, bool)
    for length in lengths:
        everywhere[::length] = False
        everywhere[tokens // length * length :] = False
    return everywhere
