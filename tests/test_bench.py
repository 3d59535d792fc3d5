"""The bench on tiny bundles: what its report holds, and what it refuses. No time is asserted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bundles

import pe_onnx
from pe_onnx import latency
from pe_onnx.bench_report import BenchReport
from pe_onnx.bench_tables import markdown
from pe_onnx.bundle import read_bundle
from pe_onnx.contestants import BundleContestant
from pe_onnx.errors import InputError, PeOnnxError
from pe_onnx.kv_cache import make_cache
from pe_onnx.session import Session

QUICK: dict[str, Any] = {"depths": (8, 40), "prompt_tokens": 5, "budget_s": 0.2, "threads": 1}


@pytest.fixture(autouse=True)
def _one_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LOADS", 1)


@pytest.fixture
def t5(t5_bundles: Bundles) -> Path:
    """A bundle of an encoder-decoder."""
    return t5_bundles("t5")


def figures(report: BenchReport) -> Iterator[tuple[str, float]]:
    """Every measured number by name."""
    for one in report.contestants:
        yield f"{one.name} first token", one.first_token_ms
        yield f"{one.name} prefill", one.prefill_tokens_per_s
        for d in one.decode:
            yield f"{one.name} decode", d.median_ms
    for ratio in report.ratios:
        yield f"{ratio.above} / {ratio.below}", ratio.ratio


def test_a_report(bundles: Bundles) -> None:
    folder = bundles("rope")
    report = pe_onnx.bench(folder, **QUICK)
    (one,) = report.contestants
    assert (one.name, one.loads, report.ratios, report.profile) == (folder.name, 1, [], [])
    assert [d.depth_tokens for d in one.decode] == [8, 40]
    for d in one.decode:
        assert (d.interval_ms is None) == (d.steps < 6)
        low, high = d.interval_ms or (d.median_ms, d.median_ms)
        assert 0 < low <= d.median_ms <= high
        assert d.p50_ms <= d.p90_ms <= d.p99_ms
        assert d.steps >= 1
        assert d.ended_by in ("precision", "budget", "turns")
    low, high = one.prefill_interval_tokens_per_s or (one.prefill_tokens_per_s, one.prefill_tokens_per_s)
    assert low <= one.prefill_tokens_per_s <= high
    bundle = read_bundle(folder)
    assert one.cache_bytes_per_token == bundle.cache_bytes_per_token
    assert one.cache_bytes == {depth: depth * bundle.cache_bytes_per_token for depth in (8, 40)}
    assert one.load_s is not None
    assert one.load_s > 0
    assert one.peak_memory_bytes is not None
    assert 20e6 < one.peak_memory_bytes < 200e6  # PyTorch alone takes more
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["contestants"][0]["decode"][0]["depth_tokens"] == 8
    assert written["budget_s"] == 0.2
    assert written["tools"]["pe-onnx"] == pe_onnx.__version__


def test_of_one_turn_there_is_no_interval(bundles: Bundles) -> None:
    """Neither in the report, nor in its tables and rows."""
    report = pe_onnx.bench(bundles("rope"), compare=[bundles("rope")], **{**QUICK, "depths": (8,), "budget_s": 1e-9})
    one = report.contestants[0]
    assert (one.prompts, one.decode[0].steps) == (1, 1)
    written = report.to_dict()
    for figures in written["contestants"]:
        assert figures["prefill_interval_tokens_per_s"] is figures["first_token_interval_ms"] is None
        assert figures["decode"][0]["interval_ms"] is None
    assert [ratio["interval"] for ratio in written["ratios"]] == [None, None]
    assert all(row["low"] is row["high"] is None for row in report.rows())
    assert ".." not in markdown(report)


def test_contestants_in_turns(bundles: Bundles) -> None:
    report = pe_onnx.bench(bundles("rope"), compare=[bundles("alibi", "portable"), "torch"], **QUICK)
    names = [one.name for one in report.contestants]
    assert names == [bundles("rope").name, bundles("alibi", "portable").name, "torch"]
    assert [(r.above, r.below, r.measure, r.depth_tokens) for r in report.ratios] == [
        (name, names[0], measure, depth)
        for measure, depth in (("first_token", None), ("decode", 8), ("decode", 40))
        for name in names[1:]
    ]
    assert {one.decode[0].steps for one in report.contestants} == {report.contestants[0].decode[0].steps}
    assert all(value > 0 for _, value in figures(report))
    assert report.contestants[2].load_s is None
    assert report.contestants[2].peak_memory_bytes is None
    assert "torch" in report.tools


def test_a_bundle_against_itself_has_two_names(bundles: Bundles) -> None:
    report = pe_onnx.bench(bundles("rope"), compare=[bundles("rope")], **QUICK)
    assert len({one.name for one in report.contestants}) == 2


def test_a_folder_named_torch_is_a_bundle(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundles("rope"), tmp_path / "torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "_eager", lambda *_: pytest.fail("PyTorch is not asked for"))
    report = pe_onnx.bench("torch", compare=["./torch", Path("torch")], **QUICK)
    assert all(one.loads for one in report.contestants)
    assert latency._names([Path("torch"), "torch"]) == ["./torch", "torch"]


def test_depths_are_clipped_to_what_the_encoding_takes(bundles: Bundles) -> None:
    folder = bundles("learned", config={"max_position_embeddings": 32})
    report = pe_onnx.bench(folder, **{**QUICK, "depths": (8, 100, 200), "prompt_tokens": 99})
    assert report.depths == [8, 31]
    assert report.clipped
    assert report.prompt_tokens == 32
    assert [d.depth_tokens for d in report.contestants[0].decode] == [8, 31]


def test_an_encoder_decoder(t5: Path) -> None:
    report = pe_onnx.bench(t5, compare=["torch"], source_tokens=9, profile=True, **QUICK)
    assert report.encoder_decoder
    assert report.prompt_tokens == 9
    assert all(value > 0 for _, value in figures(report))
    assert [phase.phase for phase in report.profile] == ["prefill", "decode", "decode"]
    assert all(phase.parts["encoding"] > 0 for phase in report.profile)


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_filled_cache_comes_back_to_where_it_was(bundles: Bundles, target: str) -> None:
    """Every step of a measurement finds the same cache: the same logits, at the same length."""
    cache = make_cache(Session(read_bundle(bundles("rope", target)), threads=1), 1, 60)
    restore = cache.fill(40, np.random.default_rng(0))
    first = cache.decode([7]).copy()
    assert cache.lengths.tolist() == [41]
    other = cache.decode([9]).copy()
    restore()
    assert (cache.lengths.tolist(), len(cache.tokens[0])) == ([40], 40)
    np.testing.assert_array_equal(cache.decode([7]), first)
    assert np.abs(other - first).max() > 1e-3
    with pytest.raises(InputError, match="61 tokens"):
        cache.fill(61, np.random.default_rng(0))


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_contestants_steps_leave_no_trace(bundles: Bundles, target: str) -> None:
    contestant = BundleContestant(bundles("rope", target), threads=1)
    contestant.begin(12)
    for _ in range(5):
        contestant.step()
    assert contestant.cache is not None
    assert contestant.cache.lengths.tolist() == [13]
    first = contestant.first_token([1, 2, 3])
    assert 0 < first.prefill_s <= first.total_s


def test_pytorch_decodes_what_the_bundle_decodes(bundles: Bundles, t5: Path) -> None:
    """The same prompt, then a step on its cache: the contestant is the model it says it is."""
    from pe_onnx.eager import PlainContestant, eager

    bundle = read_bundle(bundles("rope"))
    plain = eager(bundle, None, "torch", 1, None)
    assert isinstance(plain, PlainContestant)
    logits, past = plain._run([1, 2, 3], 0, ())
    step, _ = plain._run([7], 3, past)
    cache = make_cache(Session(bundle, threads=1), 1, 8)
    np.testing.assert_allclose(cache.prefill([[1, 2, 3]])[0], logits[0, -1].detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(cache.decode([7])[0], step[0, -1].detach().numpy(), atol=1e-4)


def test_a_cache_of_transformers_is_filled_and_put_back(bundles: Bundles) -> None:
    """To the tokens it is filled from, the step is that of the whole text; deeper, it is the same step again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pe_onnx.contestants import STEP_TOKEN, random_tokens
    from pe_onnx.eager import SEEDED_TOKENS, TransformersContestant, eager

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    contestant = eager(read_bundle(bundles("rope")), model, "torch", 1, None)
    assert isinstance(contestant, TransformersContestant)
    text = [*random_tokens(SEEDED_TOKENS, 64), STEP_TOKEN]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([text])).logits[0, -1]
        contestant.begin(SEEDED_TOKENS)
        np.testing.assert_allclose(contestant._run([STEP_TOKEN], contestant.cache)[0, -1], whole, atol=1e-5)
        contestant.begin(50)
        contestant.step()
        assert contestant.cache.get_seq_length() == 51
        contestant.step()
        assert contestant.cache.get_seq_length() == 51


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"depths": ()}, "depths"),
    ({"depths": (0,)}, "depths = 0"),
    ({"prompt_tokens": 0}, "prompt_tokens = 0"),
    ({"source_tokens": 0}, "source_tokens = 0"),
    ({"budget_s": 0.0}, "budget = 0.0"),
    ({"budget_s": float("nan")}, "budget = nan"),
    ({"precision": 0.0}, "precision = 0.0"),
    ({"threads": -1}, "threads = -1"),
    ({"provider": "cup"}, "did you mean 'cpu'"),
    ({"compare": ["nowhere"]}, "nowhere is not a bundle"),
    ({"reference": "somewhere"}, "--compare torch"),
    ({"compare": ["torch"], "reference": "somewhere"}, "somewhere is gone"),
    ({"depths": (10**12,)}, "GB are free"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(bundles: Bundles, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PeOnnxError) as error:
        pe_onnx.bench(bundles("rope"), **{**QUICK, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoder_is_not_compared_with_an_encoder_decoder(bundles: Bundles, t5: Path) -> None:
    with pytest.raises(PeOnnxError, match="cannot be compared"):
        pe_onnx.bench(bundles("rope"), compare=[t5], **QUICK)
