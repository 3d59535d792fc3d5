"""How far the contestants of ``peers.py`` are from float32: KL of the next token, and bits per byte of a text.

The text is cut into windows of equal length that start anew, each behind the token that begins texts, so that every
token of the text is predicted. Logits are float32; sums are in float64. For the reference's p and a contestant's q,

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v)), nats a token
    bits per byte = sum over tokens of -log2 q(token) / bytes of the text
"""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from peer_processes import WorkerError, WorkerProcess
from peer_speed import RESERVE_TOKENS, Start

WINDOW_TOKENS = 512
REFERENCE = "reference"
ROWS = 64
"""Of logits taken to float64 at a time."""

Array = np.ndarray[Any, Any]


@dataclass
class Quality:
    """Sums over the text so far."""

    kl_nats: float = 0.0
    bits: float = 0.0
    agreed: int = 0
    """Tokens whose most likely successor is the reference's."""
    tokens: int = 0

    def add(self, reference: Array, logits: Array, targets: Array) -> None:
        """reference, logits ``[T, V]``; targets ``[T]``, the tokens that followed."""
        for begin in range(0, len(targets), ROWS):
            rows = slice(begin, begin + ROWS)
            p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
            self.kl_nats += float((np.exp(p) * (p - q)).sum())
            self.bits -= float(np.take_along_axis(q, targets[rows, None], 1).sum()) / math.log(2)
            self.agreed += int((p.argmax(1) == q.argmax(1)).sum())
        self.tokens += len(targets)

    def figures(self, text_bytes: int) -> dict[str, float]:
        return {
            "kl_nats_per_token": self.kl_nats / self.tokens,
            "bits_per_byte": self.bits / text_bytes,
            "same_first_choice": self.agreed / self.tokens,
        }


def log_softmax(logits: Array) -> Array:
    """float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def windows(ids: list[int], first: int) -> list[list[int]]:
    """Texts of at most WINDOW_TOKENS tokens, each behind the token ``first``."""
    length = WINDOW_TOKENS - 1
    return [[first, *ids[begin : begin + length]] for begin in range(0, len(ids), length)]


def measure(starts: dict[str, Start], reference: Start, checkpoint: Path, text: str) -> dict[str, dict[str, Any]]:
    """Figures of each contestant and of ``reference``, or ``error``. checkpoint: whose tokenizer all of them take."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = windows(tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id)
    sums = {name: Quality() for name in (REFERENCE, *starts)}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {REFERENCE: stack.enter_context(reference())}
        workers[REFERENCE].load(WINDOW_TOKENS + RESERVE_TOKENS)
        for name, start in starts.items():
            workers[name] = stack.enter_context(start())
            try:
                workers[name].load(WINDOW_TOKENS + RESERVE_TOKENS)
            except WorkerError as error:
                failed[name] = str(error)
        for number, ids in enumerate(texts):
            click.echo(f"quality: window {number + 1} of {len(texts)}", err=True)
            right = None
            for name, worker in workers.items():
                if name in failed:
                    continue
                try:
                    found = _logits(worker, ids, Path(folder, "logits.npy"))
                except WorkerError as error:
                    if right is None:
                        raise  # there is nothing to compare with
                    click.echo(f"{name}: {error}", err=True)
                    failed[name] = str(error)
                    continue
                right = found if right is None else right
                sums[name].add(right, found, np.asarray(ids[1:]))
    size = len(text.encode())
    return {name: {"error": failed[name]} if name in failed else q.figures(size) for name, q in sums.items()}


def _logits(worker: WorkerProcess, ids: list[int], file: Path) -> Array:
    """float32 ``[T, V]`` behind each token but the last."""
    worker.ask("logits", tokens=ids[:-1], file=str(file))
    found: Array = np.load(file)
    if len(found) != len(ids) - 1:
        raise WorkerError(f"logits of {len(found)} tokens came back for {len(ids) - 1}")
    return found
