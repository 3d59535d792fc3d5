"""Sampling against transformers' logits processors, and draws against the distribution they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pe_onnx.errors import BundleError, ConfigError, InputError, PeOnnxError
from pe_onnx.sampling import Sampler, SamplingOptions, probabilities

COMBINATIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.0},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.8, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.15},
]


def transformers_probabilities(row: np.ndarray, history: list[int], **options: float) -> np.ndarray:
    """What `generate(do_sample=True)` draws from: its processors in its order, in float64."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(options.get("temperature", 1.0)))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores = torch.tensor(row[None].astype(np.float64))
    return processors(torch.tensor([history]), scores).softmax(-1)[0].numpy()


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 63, 1009])
def test_probabilities_are_those_of_transformers(options: dict[str, float], V: int) -> None:
    rng = np.random.default_rng(V)
    for spread in (0.5, 3.0, 12.0):
        row = (rng.standard_normal(V) * spread).astype(np.float32)
        history = rng.integers(0, V, size=17).tolist()
        got = probabilities(row, history, SamplingOptions(**{"temperature": 1.0, **options}))
        want = transformers_probabilities(row, history, **options)
        np.testing.assert_array_equal(got > 0, want > 0)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_k": 3},
        {"top_p": 0.3},
        {"top_p": 0.6},
        {"top_p": 0.85},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.5},
        {"repetition_penalty": 2.0, "top_k": 2},
    ],
    ids=str,
)
def test_ties_are_kept_as_in_transformers(options: dict[str, float]) -> None:
    row = np.array([1, 2, 2, 0, 2, -1, 1, 2, -1, 4, 4, 0.5], dtype=np.float32)
    history = [9, 10, 5]  # 4 / 2 makes two more that are equal to 2
    got = probabilities(row, history, SamplingOptions(temperature=1.0, **options))
    want = transformers_probabilities(row, history, **options)
    np.testing.assert_array_equal(np.flatnonzero(got), np.flatnonzero(want))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_sum_that_is_exactly_one_minus_top_p_is_dropped() -> None:
    row = np.zeros(4, dtype=np.float32)
    for top_p, kept in ((0.75, [1, 2, 3]), (0.5, [2, 3]), (0.25, [3])):
        got = probabilities(row, [], SamplingOptions(temperature=1.0, top_p=top_p))
        assert np.flatnonzero(got).tolist() == kept
        np.testing.assert_array_equal(got, transformers_probabilities(row, [0], top_p=top_p))


def test_order_of_the_steps_matters_and_is_that_of_transformers() -> None:
    row = np.linspace(3, -3, 13, dtype=np.float32)
    history = [0, 4]
    options = {"temperature": 3.0, "top_k": 6, "top_p": 0.6, "repetition_penalty": 4.0}
    got = probabilities(row, history, SamplingOptions(**options))
    np.testing.assert_allclose(got, transformers_probabilities(row, history, **options), rtol=1e-6)
    steps = [
        RepetitionPenaltyLogitsProcessor(4.0),
        TemperatureLogitsWarper(3.0),
        TopKLogitsWarper(6),
        TopPLogitsWarper(0.6),
    ]
    for wrong in ([0, 1, 3, 2], [0, 3, 1, 2], [0, 2, 3, 1], [1, 2, 3, 0]):
        chain = LogitsProcessorList([steps[step] for step in wrong])
        scores = chain(torch.tensor([history]), torch.tensor(row[None].astype(np.float64)))
        other = scores.softmax(-1)[0].numpy()
        assert not np.allclose(got, other, rtol=1e-3), wrong


def test_history_outside_the_vocabulary_does_not_count() -> None:
    row = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    options = SamplingOptions(temperature=1.0, repetition_penalty=2.0)
    plain = probabilities(row, [], SamplingOptions(temperature=1.0))
    np.testing.assert_array_equal(probabilities(row, [3, 99, -1], options), plain)
    np.testing.assert_array_equal(probabilities(row, [], options), plain)
    assert not np.array_equal(probabilities(row, [2], options), plain)


def test_masked_tokens_are_never_drawn() -> None:
    row = np.array([-np.inf, 1.0, -np.inf, 0.5], dtype=np.float32)
    for extra in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 1e-9}, {"repetition_penalty": 1.2}):
        got = probabilities(row, [0, 1], SamplingOptions(temperature=5.0, **extra))
        assert np.flatnonzero(got).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    row = np.array([1e30, 3e30, 2e30, -3e38], dtype=np.float32)
    assert probabilities(row, [], SamplingOptions(temperature=temperature)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}],
    ids=str,
)
def test_draws_have_the_frequencies_of_the_distribution(options: dict[str, float]) -> None:
    V, draws = 23, 4000
    rng = np.random.default_rng(5)
    row = rng.standard_normal(V).astype(np.float32)
    history = [1, 2, 3]
    sampler = Sampler(SamplingOptions(**{"temperature": 1.0, "seed": 11, **options}), 2)
    pairs = [sampler.sample(np.stack([row, row]), [history, history]) for _ in range(draws)]
    counts = np.bincount(np.concatenate(pairs), minlength=V)
    want = transformers_probabilities(row, history, **options) * 2 * draws
    assert counts[want == 0].sum() == 0
    assert chi_square_per_freedom(counts, want) < 2  # 22, 4 and 8 degrees of freedom; the seed is fixed
    flattened = np.where(want > 0, want.sum() / np.count_nonzero(want), 0)
    assert chi_square_per_freedom(counts, flattened) > 5  # the check tells a wrong distribution apart


def chi_square_per_freedom(counts: np.ndarray, want: np.ndarray) -> float:
    seen = want > 0
    return float(((counts[seen] - want[seen]) ** 2 / want[seen]).sum() / (np.count_nonzero(seen) - 1))


def draw(seed: int | None, logits: np.ndarray, steps: int = 40) -> np.ndarray:
    """Tokens ``[steps, B]`` of one sampler on the same logits ``[B, V]`` at each step."""
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), len(logits))
    return np.stack([sampler.sample(logits, [[]] * len(logits)) for _ in range(steps)])


def test_a_row_depends_on_its_seed_and_index_only() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 63)).astype(np.float32)
    drawn = draw(7, logits)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(drawn, draw(7, logits))
    np.testing.assert_array_equal(drawn[:, :1], draw(7, logits[:1]))
    others = logits.copy()
    others[[0, 2]] = rng.standard_normal((2, 63))
    np.testing.assert_array_equal(drawn[:, 1], draw(7, others)[:, 1])
    assert not np.array_equal(drawn, draw(8, logits))
    same_row_twice = draw(7, np.stack([logits[0], logits[0]]))
    assert not np.array_equal(same_row_twice[:, 0], same_row_twice[:, 1])


def test_without_a_seed_two_samplers_differ() -> None:
    logits = np.zeros((1, 1000), dtype=np.float32)
    assert not np.array_equal(draw(None, logits), draw(None, logits))


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([[0, 3, 1, 3], [5, 1, 1, 1], [-9, -9, -9, -9]], dtype=np.float32)
    tokens = Sampler(SamplingOptions(), 3).sample(logits, [[], [], []])
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [1, 0, 0]
    assert probabilities(logits[0], [], SamplingOptions()).tolist() == [0, 1, 0, 0]


def test_greedy_with_a_repetition_penalty() -> None:
    logits = np.array([[4.0, 3.0, -1.0], [-1.0, -1.5, -4.0]], dtype=np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), 2)
    assert sampler.sample(logits, [[0, 0, 0], [0]]).tolist() == [1, 1]
    assert sampler.sample(logits, [[], []]).tolist() == [0, 0]
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 2, "top_p": 0.5}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused_in_one_line(options: dict[str, float], bad: float) -> None:
    logits = np.zeros((2, 5), dtype=np.float32)
    logits[1, 3] = bad
    with pytest.raises(BundleError, match=r"row 1 is (nan|inf)") as caught:
        Sampler(SamplingOptions(**options), 2).sample(logits, [[], []])
    assert isinstance(caught.value, PeOnnxError)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="-inf"):
        Sampler(SamplingOptions(**options), 1).sample(np.full((1, 5), -np.inf, np.float32), [[]])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 0), (2, 1, 5)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        Sampler(SamplingOptions(), 2).sample(np.zeros(shape, np.float32), [[], []])
    with pytest.raises(InputError, match="1 histories"):
        Sampler(SamplingOptions(), 2).sample(np.zeros((2, 5), np.float32), [[]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("min_p", 2),
        ("min_p", None),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", -3),
        ("seed", 1.0),
    ],
)
def test_options_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = ") as caught:
        SamplingOptions(**{name: value})
    assert repr(value) in str(caught.value)


def test_numpy_numbers_are_options_too_and_a_batch_has_rows() -> None:
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, seed=np.int64(1))
    assert Sampler(options, 1).sample(np.zeros((1, 9), np.float32), [[]]).shape == (1,)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        Sampler(options, 0)
