"""Beam search against transformers' own ``generate``, on logits of the same model.

Vocabularies are small and end tokens likely, so that beams end at all steps, and sources of a batch at different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import draw
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from pe_onnx.beam_search import BeamOptions, BeamSearch, Hypothesis
from pe_onnx.errors import BundleError, ConfigError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

V, PAD, START = 41, 0, 1
ENDS = (2, 3, 5, 7, 11)
NEW = 12


@cache
def decoder() -> PreTrainedModel:
    sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": START}
    return drawn(GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None, tie_word_embeddings=False)))


@cache
def encoder_decoder() -> PreTrainedModel:
    sizes = {"vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return drawn(T5ForConditionalGeneration(T5Config(**sizes, eos_token_id=None, tie_word_embeddings=False)))


@torch.no_grad()
def drawn(model: PreTrainedModel) -> PreTrainedModel:
    """Several tokens have a chance at each step, and the end tokens now a great one, now none."""
    draw(model)
    head = model.get_output_embeddings().weight  # [V, C]
    head.mul_(1.2 / head.std() * 32**-0.5)
    head[list(ENDS)] *= 2
    return model.eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(12, V, rng.integers(1, 9)).tolist() for _ in range(count)]


def padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, ``[B, longest]``."""
    longest = max(map(len, rows))
    gaps = [[0] * (longest - len(row)) for row in rows]
    sides = [(gap, [*row]) if left else ([*row], gap) for row, gap in zip(rows, gaps, strict=True)]
    marks = [(gap, [1] * len(row)) if left else ([1] * len(row), gap) for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor([a + b for a, b in sides]), torch.tensor([a + b for a, b in marks])


@torch.no_grad()
def theirs(model: PreTrainedModel, rows: list[list[int]], k: int, ends: Sequence[int], **options: Any) -> list[Any]:
    """Of each source (tokens up to its end, score), best first."""
    ids, mask = padded(rows, left=not model.config.is_encoder_decoder)
    start = {"decoder_start_token_id": START} if model.config.is_encoder_decoder else {}
    out = model.generate(
        ids,
        attention_mask=mask,
        num_beams=k,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=list(ends) or None,
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": NEW, **start, **options},
    )
    made = out.sequences[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    scores = out.sequences_scores.tolist() if k > 1 else [None] * len(made)
    n = options.get("num_return_sequences", 1)
    texts = [(cut(tokens, ends), score) for tokens, score in zip(made, scores, strict=True)]
    return [texts[b * n : (b + 1) * n] for b in range(len(rows))]


def cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


@torch.no_grad()
def ours(
    model: PreTrainedModel,
    rows: list[list[int]],
    k: int,
    ends: Sequence[int],
    follow_parents: bool = True,
    **options: Any,
) -> list[list[Hypothesis]]:
    """`BeamSearch` on the model's logits, each a whole pass over the tokens of its row."""
    names = ("length_penalty", "early_stopping", "num_return_sequences")
    beams = BeamOptions(k, **{name: options.pop(name) for name in names if name in options})
    seq2seq = model.config.is_encoder_decoder
    held = [[START] for _ in rows] if seq2seq else [list(row) for row in rows]
    limit = options.pop("max_new_tokens", NEW)
    search = BeamSearch(beams, held, limit, ends, **options)
    sources = list(range(len(rows)))
    while not search.done:
        if seq2seq:
            ids, mask = padded([rows[b] for b in sources], left=False)
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor(held)).logits[:, -1]
        else:
            ids, mask = padded(held, left=True)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        tokens, parents = search.step(logits.numpy())
        assert tokens.dtype == parents.dtype == np.int64
        if not follow_parents and len(held) == len(parents):
            parents = np.arange(len(parents))
        held = [[*held[parent], int(token)] for token, parent in zip(tokens, parents, strict=True)]
        sources = [sources[parent] for parent in parents]
    return search.finish()


def agree(got: list[list[Hypothesis]], want: list[Any]) -> bool:
    """The same tokens, and scores to a few units in the last place of float32."""
    return all(
        len(a) == len(b)
        and all(
            h.tokens == tokens and (s is None or abs(h.score - s) <= 3e-6 * max(1, abs(s)))
            for h, (tokens, s) in zip(a, b, strict=True)
        )
        for a, b in zip(got, want, strict=True)
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0},
    {"length_penalty": -1.5},
    {"early_stopping": True},
    {"early_stopping": True, "length_penalty": 0.3},
    {"early_stopping": "never"},
    {"early_stopping": "never", "length_penalty": 0.0},
    {"early_stopping": "never", "length_penalty": -0.7},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.8, "min_new_tokens": 3},
    {"min_new_tokens": 5, "length_penalty": 1.4},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("model", [decoder, encoder_decoder])
def test_hypotheses_are_those_of_transformers(model: Any, k: int, options: dict[str, Any]) -> None:
    """20 prompts in one batch, so that sources end at different times; all k hypotheses of each."""
    options = {"num_return_sequences": k, **options}
    rows = prompts(20, seed=k)
    assert agree(ours(model(), rows, k, ENDS, **options), theirs(model(), rows, k, ENDS, **options))


@pytest.mark.parametrize("ends", [(), (2,), (2, 3), tuple(range(2, 12))], ids=len)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_any_number_of_end_tokens(k: int, ends: tuple[int, ...]) -> None:
    """One beam is greedy search."""
    rows = prompts(20, seed=9)
    for early in (False, True, "never"):
        got = ours(decoder(), rows, k, ends, early_stopping=early)
        assert agree(got, theirs(decoder(), rows, k, ends, early_stopping=early if k > 1 else False))
        assert all(len(source) == 1 for source in got)


def test_a_source_alone_gives_what_it_gives_in_a_batch() -> None:
    rows = prompts(6, seed=3)
    together = ours(decoder(), rows, 3, ENDS)
    assert len({len(source[0].tokens) for source in together}) > 2, "they end at different times"
    for row, source in zip(rows, together, strict=True):
        assert [h.tokens for h in ours(decoder(), [row], 3, ENDS)[0]] == [h.tokens for h in source]


def test_limits_may_differ_between_sources() -> None:
    rows = prompts(4, seed=5)
    limits = [1, 7, NEW, 4]
    together = ours(decoder(), rows, 3, ENDS, max_new_tokens=limits, num_return_sequences=3)
    for row, limit, source in zip(rows, limits, together, strict=True):
        assert agree([source], theirs(decoder(), [row], 3, ENDS, max_new_tokens=limit, num_return_sequences=3))


def test_a_search_that_forgets_something_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, options = prompts(20, seed=1), {"length_penalty": 2.0, "num_return_sequences": 3}
    want = theirs(decoder(), rows, 3, ENDS, **options)
    assert agree(ours(decoder(), rows, 3, ENDS, **options), want)
    assert not agree(ours(decoder(), rows, 3, ENDS, follow_parents=False, **options), want)
    assert not agree(ours(decoder(), rows, 3, ENDS[:2], **options), want)
    monkeypatch.setattr(BeamSearch, "_length_factor", lambda self, n: np.float32(1))
    assert not agree(ours(decoder(), rows, 3, ENDS, **options), want)


def test_the_first_step_points_at_prompts_and_the_next_at_beams() -> None:
    search = BeamSearch(BeamOptions(3), [[1], [2]], 9)
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.35, 0.15, 0.1]], np.float32))
    tokens, parents = search.step(logits)
    assert tokens.tolist() == [3, 2, 1, 0, 1, 2]
    assert parents.tolist() == [0, 0, 0, 1, 1, 1]
    tokens, parents = search.step(np.repeat(np.log(np.array([[0.97, 0.01, 0.01, 0.01]], np.float32)), 6, axis=0))
    assert tokens.tolist() == [0] * 6
    assert parents.tolist() == [0, 1, 2, 3, 4, 5]
    certain = np.full((6, 4), -30, np.float32)
    certain[:, 1] = 0
    certain[2, 2], certain[5, 2] = 0, 0
    tokens, parents = search.step(certain)
    assert parents[:3].tolist() == [0, 1, 2]
    assert search.active.tolist() == [True] * 6


def test_equals_are_taken_in_order() -> None:
    search = BeamSearch(BeamOptions(3), [[1]], 9)
    tokens, _ = search.step(np.zeros((1, 7), np.float32))
    assert tokens.tolist() == [0, 1, 2]
    tokens, parents = search.step(np.zeros((3, 7), np.float32))
    assert (tokens.tolist(), parents.tolist()) == ([0, 1, 2], [0, 0, 0])


def test_a_source_at_its_end_rests_and_its_logits_do_not_count() -> None:
    search = BeamSearch(BeamOptions(2, early_stopping=True), [[1], [1]], 5, [0])
    logits = np.full((2, 6), -1, np.float32)
    logits[0, :2], logits[1, 3:5] = 5, 5
    search.step(logits)
    logits = np.full((4, 6), -1, np.float32)
    logits[:2, 0], logits[2:, 3] = 9, 9
    search.step(logits)
    assert search.active.tolist() == [False, False, True, True]
    before = search.finish()[0]
    logits[:2] = np.nan
    tokens, parents = search.step(logits)
    assert (tokens[:2].tolist(), parents[:2].tolist()) == ([0, 0], [0, 1])
    assert search.finish()[0] == before
    assert not search.done


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 0}, "num_beams = 0"),
        ({"num_beams": 2.0}, "num_beams = 2.0"),
        ({"num_beams": True}, "num_beams = True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences = 3: accepted is at most num_beams = 2"),
        ({"num_return_sequences": 0}, "num_return_sequences = 0"),
        ({"length_penalty": float("nan")}, "length_penalty = nan"),
        ({"length_penalty": float("inf")}, "length_penalty = inf"),
        ({"length_penalty": "1"}, "length_penalty = '1'"),
        ({"early_stopping": "always"}, "early_stopping = 'always'"),
        ({"early_stopping": None}, "early_stopping = None"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        BeamOptions(**options)


def test_what_a_search_refuses() -> None:
    for limit in (0, [3], [3, 0]):
        with pytest.raises(ConfigError, match="max_new_tokens"):
            BeamSearch(BeamOptions(2), [[1], [2]], limit)
    with pytest.raises(ConfigError, match="repetition_penalty = 0"):
        BeamSearch(BeamOptions(2), [[1]], 3, repetition_penalty=0)
    with pytest.raises(ConfigError, match=r"length_penalty = 90.0 is too great for 3 tokens"):
        BeamSearch(BeamOptions(2, 90.0), [[1]], 3)
    search = BeamSearch(BeamOptions(2), [[1], [2]], 3)
    for shape in ((4, 5), (2, 0), (2,), (1, 5)):
        with pytest.raises(InputError, match=r"accepted is \[2, V\]"):
            search.step(np.zeros(shape, np.float32))
    bad = np.zeros((2, 5), np.float32)
    bad[1, 2] = np.nan
    with pytest.raises(BundleError, match="row 1 is nan"):
        search.step(bad)
