"""Encoder-decoders of the T5 kind against transformers: both graphs, and the generated tokens.

Every variant of ``t5_models.py`` is a sweep; here some of them, one on each path.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import t5_models
import torch
from conftest import Bundles
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import pe_onnx
import pe_onnx.sources
from pe_onnx.beam_search import BeamOptions
from pe_onnx.errors import CheckpointError, ConfigError, InputError, PeOnnxError
from pe_onnx.models.families import t5
from pe_onnx.parity import check_parity
from pe_onnx.sampling import SamplingOptions
from pe_onnx.session import Session

LIMIT = 5e-5
BROKEN = 1e-2
"""Of the spread: two hundred times what is allowed."""
TOKENS = 300
"""Past the farthest bucket, 128."""
ENDS = t5_models.ENDS

FAST = [("umt5", "ort")]
TURNS = [(name, ("ort", "portable")[i % 2]) for i, name in enumerate((*t5_models.VARIANTS, *t5_models.REALISTIC))]
"""Each variant on one target, in turn."""


def exported(folder: Path, name: str, target: str, **changes: Any) -> tuple[Path, PreTrainedModel]:
    """A variant's bundle, and transformers' model."""
    model = t5_models.write(folder / "checkpoint", name, **changes)
    pe_onnx.export(model=folder / "checkpoint", output=folder / target, target=target)
    return folder / target, model


@pytest.mark.parametrize(
    ("name", "target"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in TURNS if pair not in FAST)]
)
def test_both_graphs_agree(name: str, target: str, tmp_path: Path) -> None:
    """Encoder, prefill, chunks, 300 single steps, ragged batches with padded sources, greedy and four beams."""
    bundle, _ = exported(tmp_path, name, target)
    report = check_parity(bundle, tokens=TOKENS)
    errors = {mode.mode: mode.relative_error for mode in report.modes}
    assert max(errors.values()) <= LIMIT, errors
    assert report.passed
    assert {"encoder", "whole", "chunks", "steps", "ragged", "greedy", "beams"} <= errors.keys()
    assert {"left_padding", "interior_padding"} <= errors.keys() or target == "ort"


@pytest.fixture(scope="module", params=["ort", "portable"])
def answering(request: pytest.FixtureRequest, t5_bundles: Bundles) -> Any:
    """A bundle with many end tokens, untied lest it repeat its last token, and transformers' model."""
    model = t5_models.build("flan_untied", eos_token_id=ENDS)
    return pe_onnx.load(t5_bundles("flan_untied", request.param, eos_token_id=ENDS)), model


def sources(count: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, 97, rng.integers(1, 60)).tolist() for _ in range(count)]


def theirs(model: PreTrainedModel, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """transformers' own generate on a padded batch: new tokens, with the end token."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    made = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, **options)[:, 1:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row)) for row in made]
    return [row[:end] for row, end in zip(made, ends, strict=True)]


def test_greedy_tokens_are_those_of_transformers(answering: Any) -> None:
    bundle, model = answering
    ours = [made.tokens for made in bundle.generate(sources(), 24)]
    assert ours == theirs(model, sources(), max_new_tokens=24)
    assert len({len(tokens) for tokens in ours}) > 4


@pytest.mark.parametrize("options", [{}, {"length_penalty": 2.0, "early_stopping": True}, {"length_penalty": -1.0}])
def test_beams_are_those_of_transformers(answering: Any, options: dict[str, Any]) -> None:
    bundle, model = answering
    ours = [made.tokens for made in bundle.generate(sources(), 24, beams=BeamOptions(4, **options))]
    assert ours == theirs(model, sources(), max_new_tokens=24, num_beams=4, **options)
    greedy = [made.tokens for made in bundle.generate(sources(), 24)]
    assert ours != greedy


def test_a_row_of_a_batch_is_the_row_alone(answering: Any) -> None:
    bundle, _ = answering
    for sampling in (None, SamplingOptions(temperature=0.8, top_k=20, seed=5)):
        together = bundle.generate(sources(6), 16, sampling)
        assert bundle.generate(sources(1)[0], 16, sampling).tokens == together[0].tokens
    assert [made.prompt_tokens for made in together] == [len(row) for row in sources(6)]


def test_one_request_after_another_keeps_nothing(answering: Any) -> None:
    bundle, _ = answering
    first, second = sources(2)
    before = bundle.generate(first, 12).tokens
    assert bundle.generate(second, 12).tokens != before
    assert bundle.generate(first, 12).tokens == before


def test_the_cross_cache_is_filled_once_and_stays(answering: Any) -> None:
    bundle, _ = answering
    cache = bundle.cache(sources=sources(2))
    held = cache.sources
    cache.prefill([[0], [0]])
    addresses = [buffer.address for buffer in held.buffers]
    filled = [buffer.host.copy() for buffer in held.buffers]
    assert all(values.any() for values in filled)
    assert held._hidden is None  # later runs could not read it
    for token in (5, 6, 7):
        cache.decode([token, token + 1])
    cache.reorder([1, 1])
    assert [buffer.address for buffer in held.buffers] != addresses  # row 0 has another source now
    cache.decode([8, 8])
    np.testing.assert_array_equal(held.buffers[0].host[0], filled[0][1])
    np.testing.assert_array_equal(held.buffers[0].host[1], filled[0][1])


def test_rows_that_change_their_source_decode_as_it(answering: Any) -> None:
    bundle, _ = answering
    cache = bundle.cache(sources=sources(3))
    cache.prefill([[0, 5, 6]] * 3)
    cache.reorder([2, 1, 0])  # equal tokens over other sources are other keys
    alone = bundle.cache(sources=[sources(3)[2]])
    alone.prefill([[0, 5, 6]])
    np.testing.assert_allclose(cache.decode([9, 9, 9])[0], alone.decode([9])[0], rtol=0, atol=1e-4)


def test_decoder_prompts_of_different_lengths(answering: Any) -> None:
    bundle, _ = answering
    prompts = [[0, 5, 6, 7], [0], [0, 9]]
    cache = bundle.cache(sources=sources(3), chunk_tokens=2)
    first = cache.prefill(prompts)
    later = cache.decode([11, 12, 13])
    for b, (source, prompt) in enumerate(zip(sources(3), prompts, strict=True)):
        alone = bundle.cache(sources=[source])
        np.testing.assert_allclose(first[b], alone.prefill([prompt])[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(later[b], alone.decode([11 + b])[0], rtol=0, atol=1e-4)


def changed(model: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    """A copy of the model with one thing lost."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        change(broken)
    return broken


def tables(model: PreTrainedModel, part: str) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if part in name and "relative_attention_bias" in name]


def drop_bias(part: str) -> Callable[[PreTrainedModel], None]:
    return lambda model: [table.zero_() for table in tables(model, part)] and None


def shift_bias(part: str) -> Callable[[PreTrainedModel], None]:
    return lambda model: [table.copy_(table.roll(1, 0)) for table in tables(model, part)] and None


def widen(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "relative_attention_max_distance"):
            module.relative_attention_max_distance *= 2


def unscale(model: PreTrainedModel) -> None:
    model.config.scale_decoder_outputs = not model.config.scale_decoder_outputs


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (drop_bias("encoder."), "encoder"),
        (shift_bias("encoder."), "encoder"),
        (drop_bias("decoder."), "steps"),
        (shift_bias("decoder."), "steps"),
        (widen, "steps"),
        (unscale, "whole"),
    ],
    ids=["no encoder bias", "encoder bias shifted", "no decoder bias", "decoder bias shifted", "distance", "scale"],
)
def test_what_is_lost_is_found(answering: Any, change: Callable[[PreTrainedModel], None], fails: str) -> None:
    bundle, model = answering
    report = check_parity(bundle.bundle.folder, changed(model, change), tokens=60, modes=[fails])
    assert not report.passed
    assert report.modes[0].relative_error > BROKEN


def test_a_padded_source_needs_its_mask(answering: Any) -> None:
    bundle, _ = answering
    ids = np.zeros((1, 40), np.int64)
    ids[0, :9] = sources(1)[0][:9]
    mask = (np.arange(40) < 9).astype(np.int64)[None]
    with_mask = bundle.encoder.evaluate({"input_ids": ids, "attention_mask": mask})[0][0, :9]
    alone = bundle.encoder.evaluate({"input_ids": ids[:, :9], "attention_mask": mask[:, :9]})[0][0]
    without = bundle.encoder.evaluate({"input_ids": ids, "attention_mask": np.ones_like(mask)})[0][0, :9]
    assert np.abs(with_mask - alone).max() < LIMIT * alone.std()
    assert np.abs(without - alone).max() > BROKEN * alone.std()


@pytest.mark.parametrize("wrong", ["encoder", "decoder"])
def test_a_wrong_bias_is_found_at_export(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = t5._bias_of

    def shifted(module: Any) -> Callable[..., torch.Tensor]:
        is_wrong = module.is_decoder == (wrong == "decoder")
        return lambda *args, **kwargs: right(module)(*args, **kwargs).roll(1, -1 if is_wrong else 0)

    monkeypatch.setattr(t5, "_bias_of", shifted)
    t5_models.write(tmp_path / "checkpoint", "t5")
    with pytest.raises(CheckpointError, match="cannot be exported exactly"):
        pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    """T5's wo stays in float32, as in transformers."""
    t5_models.write(tmp_path / "checkpoint", "t5_v1_1")
    bundle = pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b", dtype="fp16")
    assert bundle.manifest["proof"]["relative_error"] < 3e-2
    report = check_parity(tmp_path / "b", tokens=40)
    assert report.passed
    graph = onnx.load(bundle.model, load_external_data=False).graph
    kinds = {x.name.rpartition("layer.")[2]: x.data_type for x in graph.initializer}
    assert kinds["2.DenseReluDense.wo.weight"] == onnx.TensorProto.FLOAT
    assert kinds["2.DenseReluDense.wi_1.weight"] == onnx.TensorProto.FLOAT16


def test_the_files_and_what_they_say(answering: Any) -> None:
    bundle = answering[0].bundle
    names = set(bundle.manifest["files"])
    assert {"encoder_model.onnx", "decoder_model.onnx"} <= names
    assert ("decoder_model_merged.onnx" in names) == (bundle.target == "portable")
    functions = set(bundle.manifest["graph"]["functions"])
    assert {"pe_onnx::T5RelativeBias", "pe_onnx::RelativeBand", "pe_onnx::CrossAttention"} <= functions
    decoder = onnx.load(bundle.model, load_external_data=False)
    bias = [node for node in decoder.graph.node if node.op_type == "T5RelativeBias"]
    assert len(bias) == 1  # for all layers
    assert bundle.manifest["encoding"]["name"] == "t5_bias"
    assert bundle.manifest["encoding"]["parameters"]["relative_attention_max_distance"]["value"] == 128


@pytest.mark.slow
def test_a_tied_embedding_stands_in_the_bundle_once(tmp_path: Path) -> None:
    bundle, model = exported(tmp_path, "t5", "ort", vocab_size=9000)
    weights = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    size = (bundle / "model.onnx.data").stat().st_size
    assert 4 * weights - 20_000 < size < 4 * weights * 1.02


def test_what_is_no_request_is_refused(answering: Any) -> None:
    bundle, _ = answering
    with pytest.raises(ConfigError, match="sources"):
        bundle.cache()
    with pytest.raises(InputError, match="no tokens"):
        bundle.generate([[3], []], 2)
    with pytest.raises(InputError, match="token id 97 must be in"):
        bundle.generate([97], 2)
    with pytest.raises(ConfigError, match="cache"):
        bundle.generate([3], 2, cache=bundle.cache(sources=[[3]]))
    cache = bundle.cache(sources=[[3], [4]])
    with pytest.raises(ConfigError, match="2 sources for a cache of 1"):
        type(cache)(bundle.session, 1, sources=cache.sources)


def test_a_source_that_memory_cannot_hold_is_refused(answering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pe_onnx.sources, "available_bytes", lambda: 100_000)
    with pytest.raises(InputError, match=r"1 x 4000 source tokens take about .* GB"):
        answering[0].generate([7] * 4000, 2)


def test_masks_that_do_not_fit_are_one_line(answering: Any) -> None:
    bundle, _ = answering
    ids = np.ones((1, 5), np.int64)
    with pytest.raises(PeOnnxError) as caught:
        bundle.encoder.evaluate({"input_ids": ids, "attention_mask": np.ones((1, 7), np.int64)})
    assert "\n" not in str(caught.value)


def test_a_bundle_without_its_encoder_is_refused(answering: Any, tmp_path: Path) -> None:
    bundle = shutil.copytree(answering[0].bundle.folder, tmp_path / "b")
    (bundle / "encoder_model.onnx").unlink()
    with pytest.raises(PeOnnxError, match=r"encoder_model\.onnx is missing"):
        pe_onnx.load(bundle)
    with pytest.raises(PeOnnxError, match=r"encoder_model\.onnx"):
        Session(pe_onnx.load(bundle, verify=False).bundle, graph="encoder_model.onnx")
