"""Beam search: of all continuations, the k most likely are followed at once. Knows logits, and nothing of sessions.

Source: ``_beam_search`` of transformers 5.23, ``generation/utils.py``, whose order of steps this is. For one source,
its k beams with scores ``s``, e end tokens, and ``n`` new tokens a beam after the step:

    1. scores         log_softmax(logits), then the repetition penalty, then -inf for end tokens while n <= the minimum
    2. candidates     the max(2, 1 + e) * k largest of s + scores over k * V: enough that k of them do not end
    3. beams          the k best candidates that do not end here
    4. hypotheses     the k best so far of score / n ** length_penalty; new are the candidates that end, at an end
                      token or the last step, if they are among the k best of all candidates
    5. the end        where no beam can overtake the worst of k hypotheses any more: s / m ** length_penalty, the best
                      beam's, is no larger, with m = n, or the greatest n if ``never`` and length_penalty > 0; with
                      early_stopping = True also as soon as there are k hypotheses

What decides is float32, as in transformers; log_softmax rounds as numpy does, an ulp or two from PyTorch. Among equals
the lowest beam and id come first, where ``torch.topk`` gives no order. A source that is at its end rests while others
go on, which changes nothing of its hypotheses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_onnx.errors import ConfigError, InputError
from pe_onnx.sampling import check_peak, penalized

NEVER = np.float32(-1e9)
"""Added to a score that is not to be chosen; finite, so that there is always something to choose."""


@dataclass(frozen=True)
class BeamOptions:
    """Of a beam search, under transformers' names. ConfigError names an option out of its range.

    ``length_penalty`` above 0 favours long texts, below 0 short ones. ``early_stopping``: step 5 of the module.
    ``num_return_sequences``: of the ``num_beams`` hypotheses of each source, the best so many.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} = {value!r}: accepted is an integer, 1 or above")
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences = {self.num_return_sequences}: accepted is at most num_beams = {self.num_beams}"
            )
        penalty = self.length_penalty
        if not isinstance(penalty, Real) or isinstance(penalty, bool) or not math.isfinite(penalty):
            raise ConfigError(f"length_penalty = {penalty!r}: accepted is a finite number; 0 is off")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f"early_stopping = {self.early_stopping!r}: accepted is True, False or 'never'")


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: new tokens, the end token included, and log-probability / n ** length_penalty."""

    tokens: list[int]
    score: float


class _Source:
    """The beams of one prompt and the k best hypotheses so far."""

    def __init__(self, prompt: Sequence[int], max_new_tokens: int, k: int) -> None:
        self.prompt = list(prompt)
        self.max_new_tokens = max_new_tokens
        self.beams: list[list[int]] = [[]] * k
        self.scores = np.full(k, NEVER)
        self.scores[0] = 0  # the k beams are equal at first: only one of them may branch
        self.hypotheses: list[list[int]] = [[]] * k
        self.hypothesis_scores = np.full(k, NEVER)
        self.finished = np.zeros(k, bool)
        self.open = True


class BeamSearch:
    """A search over ``B = len(prompts)`` sources, ``k = num_beams`` rows each: source b has rows b*k .. b*k + k - 1.

    prompts: the token ids the model has seen of each source; only the repetition penalty reads them.
    max_new_tokens: of all sources, or of each. min_new_tokens: an end token comes after them. ``k = 1`` is greedy
    search. Raises ConfigError for numbers out of range. Drawing beams (``do_sample``) is not supported.

    The rows of a cache follow the search so (``Model.generate``)::

        tokens, parents = search.step(prefilled)            # [B, V] of the prompts
        cache.expand(k)
        while not search.done:
            tokens, parents = search.step(cache.decode(tokens, search.active))
            cache.reorder(parents)
    """

    def __init__(
        self,
        options: BeamOptions,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        eos_token_ids: Collection[int] = (),
        *,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
    ) -> None:
        B = len(prompts)
        limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * B
        if B < 1 or len(limits) != B or min(limits) < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens} must be at least 1, for each of {B} prompts")
        if not 0 < repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty = {repetition_penalty!r}: accepted is above 0; 1 is off")
        if abs(options.length_penalty) * math.log(max(limits)) > 80:  # float32 ends at exp(88)
            raise ConfigError(
                f"length_penalty = {options.length_penalty} is too great for {max(limits)} tokens: "
                f"{max(limits)} ** {options.length_penalty} must be a float32"
            )
        self.options = options
        self.repetition_penalty = repetition_penalty
        self.min_new_tokens = min_new_tokens
        self.new_tokens = 0
        """Of each beam so far."""
        self._ends = np.array(sorted(set(eos_token_ids)), np.int64)
        self._candidates = max(2, 1 + len(self._ends)) * options.num_beams
        self._at_first_end = options.early_stopping is True or options.num_beams == 1
        self._sources = [_Source(p, int(n), options.num_beams) for p, n in zip(prompts, limits, strict=True)]

    @property
    def active(self) -> NDArray[np.bool_]:
        """Bool ``[B * k]``: the rows of sources that are not at their end."""
        return np.repeat([source.open for source in self._sources], self.options.num_beams)

    @property
    def done(self) -> bool:
        """Whether every source is at its end."""
        return not any(source.open for source in self._sources)

    def step(self, logits: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens that continue the beams, and the row of ``logits`` each continues, both int64 ``[B * k]``.

        ``logits`` is float32 ``[B * k, V]``, at the first step ``[B, V]``: those of the prompts. A source at its end
        keeps its rows, with token 0. Raises InputError for another shape, and BundleError when the largest logit of a
        row is not a finite number.
        """
        k, rows = self.options.num_beams, np.asarray(logits, np.float32)
        a_source = k if self.new_tokens else 1  # rows of logits
        wanted = len(self._sources) * a_source
        if rows.ndim != 2 or len(rows) != wanted or rows.shape[1] == 0:
            raise InputError(f"logits of shape {list(rows.shape)}: accepted is [{wanted}, V] with V above 0")
        tokens = np.zeros((len(self._sources), k), np.int64)
        parents = np.arange(len(self._sources) * k).reshape(-1, k) if self.new_tokens else np.zeros_like(tokens)
        for b, source in enumerate(self._sources):
            first = b * a_source
            if source.open:
                scores = self._scores(source, rows[first : first + a_source], first)
                tokens[b], beams = self._advance(source, np.broadcast_to(scores, (k, rows.shape[1])))
                parents[b] = first + beams if self.new_tokens else first
        self.new_tokens += 1
        return tokens.ravel(), parents.ravel()

    def finish(self) -> list[list[Hypothesis]]:
        """Of each source the ``num_return_sequences`` best hypotheses, best first; call it when the search is done."""
        n = self.options.num_return_sequences
        return [
            [Hypothesis(list(source.hypotheses[i]), float(source.hypothesis_scores[i])) for i in range(n)]
            for source in self._sources
        ]

    def _scores(self, source: _Source, logits: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Step 1, on the rows of one source; ``first`` is their index, for the error."""
        for row, peak in enumerate(logits.max(1)):
            check_peak(peak, first + row)
        scores = _log_softmax(logits)
        if self.repetition_penalty != 1:
            for row in range(len(scores)):
                scores[row] = penalized(scores[row], source.prompt + source.beams[row], self.repetition_penalty)
        if self.new_tokens < self.min_new_tokens:
            scores[:, self._ends[self._ends < scores.shape[1]]] = -np.inf
        return scores

    def _advance(self, source: _Source, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Steps 2 to 5 of one source, on ``[k, V]``: the new tokens of its beams, and which beam each continues."""
        k, V = scores.shape
        n = self.new_tokens + 1
        totals = (scores + source.scores[:, None]).ravel()
        best = _largest(totals, self._candidates)
        beams, ids = np.divmod(best, V)
        totals = totals[best]
        candidates = [[*source.beams[beam], int(token)] for beam, token in zip(beams, ids, strict=True)]
        ends = np.isin(ids, self._ends) | (n >= source.max_new_tokens)

        going = np.where(ends, totals + NEVER, totals)
        kept = _largest(going, k)
        source.beams, source.scores = [candidates[i] for i in kept], going[kept]

        now = ends & (np.arange(len(best)) < k)
        finals = totals / self._length_factor(n)
        merged = np.concatenate((source.hypothesis_scores, np.where(now, finals, finals + NEVER)))
        chosen = _largest(merged, k)
        texts = [*source.hypotheses, *candidates]
        source.hypotheses, source.hypothesis_scores = [texts[i] for i in chosen], merged[chosen]
        source.finished = np.concatenate((source.finished, now))[chosen]

        longest = self.options.early_stopping == "never" and self.options.length_penalty > 0
        reachable = source.scores[0] / self._length_factor(source.max_new_tokens if longest else n)
        worst = np.where(source.finished, source.hypothesis_scores.min(), NEVER).min()
        full = self._at_first_end and bool(source.finished.all())
        source.open = bool(reachable > worst) and not full and n < source.max_new_tokens
        return ids[kept], beams[kept]

    def _length_factor(self, n: int) -> np.float32:
        return np.float32(n**self.options.length_penalty)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row; subtracts in PyTorch's order."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, the largest first, the lowest index first among equals."""
    count = min(count, len(values))
    at_least = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return at_least[np.argsort(-values[at_least], kind="stable")][:count]
