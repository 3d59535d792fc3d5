"""The proof of an export: a few tokens through the untouched model, against what stands in for it.

Two trials: a ragged batch from an empty cache, and one row behind a long past, beyond every window, chunk and switch
of frequencies. That past is random keys and values, so that the second costs no more than a few tokens however long the
window is. Each trial is a prompt and two single steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pe_onnx.contract import Target
from pe_onnx.models.attention import LayerCache

PROMPT, STEPS = 24, 2
BEYOND = 3
"""Tokens that the long past goes beyond the last window or switch."""
PAST_BYTES = 2 << 30
"""Of the long past in float32; where it would take more, the proof says that it leaves the trial out."""
SLACK = 16
"""Slots behind a compact past: room for the new tokens and some unused, as a preallocated buffer has them."""

Array = np.ndarray[Any, Any]


@dataclass
class Feed:
    """One run: the graph's inputs without the cache."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    valid: list[slice]
    """The new tokens of each row that are no padding."""


Run = Callable[[Feed, list[LayerCache]], tuple[torch.Tensor, list[LayerCache]]]
"""To logits ``[B, T or 1, V]`` and presents."""
Reference = Callable[[torch.Tensor, int, list[LayerCache]], list[torch.Tensor]]
"""A row's tokens ``[n]``, its prompt's length and its past ``[1, K, P, D]`` a layer, to the logits of the prompt
``[n - STEPS, V]`` and of each step ``[1, V]``."""


@dataclass
class Trial:
    """Rows of tokens behind a past of ``past`` tokens."""

    rows: list[torch.Tensor]
    past: int
    caches: list[LayerCache]
    """Each ``[1, K, past, D]``; empty where past is 0."""
    expected: list[list[torch.Tensor]]
    """Of each row: the logits of its prompt and of each step."""


class Proof:
    """The trials and what the reference gives for them."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        vocab_size: int,
        reference: Reference,
        reaches: Sequence[int] = (),
        limit: int | None = None,
        alone: bool = False,
        cached: Callable[[torch.Tensor, torch.Tensor], LayerCache] = lambda key, value: (key, value),
    ) -> None:
        """shapes: K, channels of keys and of values of each cache. reaches: tokens of each window, chunk and switch;
        limit: tokens the encoding can take; alone: rows of a batch influence each other, so no batch; cached: what the
        runs cache in place of the reference's keys and values."""
        self.cached = cached
        generator = torch.Generator().manual_seed(0)
        prompt = PROMPT if limit is None else max(1, min(PROMPT, limit - STEPS))

        def tokens(n: int) -> torch.Tensor:
            return torch.randint(0, vocab_size, (n + STEPS,), generator=generator)

        rows = [tokens(prompt)] if alone or prompt < 4 else [tokens(prompt), tokens(prompt - 3)]
        self.trials = [Trial(rows, 0, [], [])]
        met = [n for n in reaches if n > 0 and (limit is None or n + BEYOND + 5 + STEPS <= limit)]
        afford = PAST_BYTES // (4 * sum(K * (D + E) for K, D, E in shapes)) - BEYOND  # tokens
        past = max((n for n in met if n <= afford), default=0) + BEYOND
        self.skipped = max((n for n in met if n > afford), default=None)
        if past > BEYOND:
            caches = [
                (torch.randn(1, K, past, D, generator=generator), torch.randn(1, K, past, E, generator=generator))
                for K, D, E in shapes
            ]
            self.trials.append(Trial([tokens(5)], past, caches, []))
        for trial in self.trials:
            trial.expected = [reference(row, len(row) - STEPS, trial.caches) for row in trial.rows]
        self.spread = float(torch.cat([x.reshape(-1) for t in self.trials for row in t.expected for x in row]).std())

    @property
    def description(self) -> str:
        """The trials in words."""
        rows = " and ".join(str(len(row)) for row in self.trials[0].rows)
        beyond = [f"{len(t.rows[0])} tokens behind {t.past}" for t in self.trials[1:]]
        skipped = "" if self.skipped is None else f"; not past {self.skipped} tokens, whose cache takes too much memory"
        return " and ".join([f"rows of {rows} tokens", *beyond]) + skipped

    @torch.no_grad()
    def error(self, run: Run, target: Target, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> float:
        """The greatest difference of a logit, of the logits' spread; infinite where one is not finite.

        sizes: K and D of each of the run's caches, D at least what keys and values have.
        """
        worst = 0.0
        for trial in self.trials:
            pairs = zip((self.cached(*pair) for pair in trial.caches), sizes, strict=False)
            caches = [
                (_widened(key, D, dtype, target), _widened(value, D, dtype, target)) for (key, value), (_, D) in pairs
            ]
            caches = caches or [(torch.zeros(len(trial.rows), K, 0, D, dtype=dtype),) * 2 for K, D in sizes]
            for i, feed in enumerate(_feeds(trial, target)):
                logits, caches = run(feed, caches)
                for b, valid in enumerate(feed.valid):
                    want = trial.expected[b][i]
                    have = logits[b, -1:] if logits.shape[1] == 1 else logits[b, valid]
                    difference = (have.float() - want[-have.shape[0] :]).abs().max()
                    worst = max(worst, float(difference) if bool(torch.isfinite(difference)) else float("inf"))
        return worst / self.spread


def of_module(
    module: Callable[..., tuple[torch.Tensor, list[LayerCache]]], caches: Sequence[tuple[int, int]], dtype: torch.dtype
) -> Reference:
    """A module that follows the graph contract as the reference of its own export: eager, a row at a time."""

    @torch.no_grad()
    def reference(row: torch.Tensor, prompt: int, past: list[LayerCache]) -> list[torch.Tensor]:
        past = past or [(torch.zeros(1, K, 0, D, dtype=dtype),) * 2 for K, D in caches]
        begin, before, logits = 0, past[0][0].shape[2], []
        for end in (prompt, *range(prompt + 1, prompt + STEPS + 1)):
            mask = torch.ones(1, before + end, dtype=torch.int64)
            positions = torch.arange(before + begin, before + end)[None]
            output, past = module(row[None, begin:end], mask, positions, past)
            logits.append(output[0].float())
            begin = end
        return logits

    return reference


def _widened(x: torch.Tensor, channels: int, dtype: torch.dtype, target: Target) -> torch.Tensor:
    """Zeros to ``channels``; unused slots behind a compact past."""
    slots = SLACK if target == "ort" else 0
    return torch.nn.functional.pad(x.to(dtype), (0, channels - x.shape[-1], 0, slots))


def _feeds(trial: Trial, target: Target) -> list[Feed]:
    """The prompt of all rows in one run, then one token of each."""
    prompts = torch.tensor([len(row) - STEPS for row in trial.rows])
    B, T = len(trial.rows), int(prompts.max())
    ids = torch.zeros(B, T, dtype=torch.int64)
    new = torch.zeros(B, T, dtype=torch.int64)
    valid = [slice(0, n) if target == "ort" else slice(T - n, T) for n in prompts.tolist()]
    for b, row in enumerate(trial.rows):
        ids[b, valid[b]], new[b, valid[b]] = row[:-STEPS], 1
    mask = torch.cat((torch.ones(B, trial.past, dtype=torch.int64), new), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, trial.past :]
    feeds = [Feed(ids, mask, positions, valid)]
    for step in range(STEPS):
        lengths = trial.past + prompts + step  # before the token
        if target == "ort":
            mask = (torch.arange(int(lengths.max()) + 1) <= lengths[:, None]).long()
        else:
            mask = torch.cat((mask, torch.ones(B, 1, dtype=torch.int64)), 1)
        ids = torch.stack([row[len(row) - STEPS + step] for row in trial.rows])[:, None]
        feeds.append(Feed(ids, mask, lengths[:, None], [slice(0, 1)] * B))
    return feeds
