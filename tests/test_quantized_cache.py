"""Keys and values in int8, and the graph for prompts of a bundle with rounded weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Bundles, Cli

import pe_onnx
from pe_onnx import calibration
from pe_onnx.bundle import PROMPT, Bundle, read_bundle
from pe_onnx.errors import ConfigError, ExportError
from pe_onnx.kv_cache import make_cache
from pe_onnx.quantization import quantize
from pe_onnx.session import OPENING_TOKENS, PROMPT_TOKENS, Session

IDS = np.random.default_rng(5).integers(0, 256, 60).tolist()


@pytest.fixture(scope="module")
def rope(bundles: Bundles) -> Bundle:
    return read_bundle(bundles("rope"))


@pytest.fixture(scope="module")
def small(rope: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An int8 cache, weights as they were."""
    return quantize(rope, tmp_path_factory.mktemp("int8") / "cache", bits=None, cache="int8")


@pytest.fixture(scope="module")
def rounded(rope: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4 weights, and so a graph for prompts."""
    return quantize(rope, tmp_path_factory.mktemp("int4") / "weights")


def filled(bundle: Bundle) -> Any:
    cache = make_cache(Session(bundle, threads=1), 1, 80)
    cache.prefill([IDS])
    return cache


def scales(bundle: Bundle) -> dict[str, Any]:
    graph = onnx.load(bundle.model).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_scale")}


def test_what_is_stored(rope: Bundle, small: Bundle) -> None:
    """The first layer's keys and values are those of the float bundle, to half a step of their channel's scale."""
    floats, integers, held = filled(rope), filled(small), scales(small)
    for i, kind in enumerate("kv"):
        want, have = floats.buffers[i].host[0, :, :60], integers.buffers[i].host[0, :, :60]
        step = held[f"present.0.{kind}_scale"].reshape(want.shape[0], 1, -1)  # [K, 1, D]
        assert have.dtype == np.int8
        inside = np.abs(want) <= 127 * step
        assert inside.mean() > 0.95
        assert (np.abs(have * step - want) <= 0.5001 * step)[inside].all()


def test_a_quarter_of_the_bytes(rope: Bundle, small: Bundle) -> None:
    assert 4 * small.cache_bytes_per_token == rope.cache_bytes_per_token
    assert 4 * filled(small).nbytes == filled(rope).nbytes


def test_the_text_goes_on_alike(rope: Bundle, small: Bundle) -> None:
    a, b = filled(rope), filled(small)
    for token in (3, 200, 77):
        want, have = a.decode([token])[0], b.decode([token])[0]
        error = float(np.sqrt(np.square(want - have).mean()) / want.std())
        assert 0 < error < 0.1


@pytest.mark.parametrize("encoding", ["alibi", "t5_bias"])
def test_with_a_bias_and_int4_weights(encoding: str, bundles: Bundles, tmp_path: Path) -> None:
    made = quantize(bundles(encoding), tmp_path / "q", cache="int8")
    assert made.manifest["proof"]["relative_error_of_cache"] < 0.2
    assert made.cache_dtype == "int8"
    assert "com.microsoft::GroupQueryAttention" in made.manifest["graph"]["operators"]


def test_rows_caches_and_files(small: Bundle, tmp_path: Path) -> None:
    """Ragged rows, rows that are exchanged, and a cache that is saved and loaded."""
    model = pe_onnx.load(small.folder, threads=1)
    cache = model.cache(2, 80)
    cache.prefill([IDS[:30], IDS[:17]])
    cache.reorder([1, 1])
    cache.save(tmp_path / "cache")
    want = cache.decode([9, 9]).copy()
    assert np.abs(want[0] - want[1]).max() < 1e-4
    assert np.array_equal(model.load_cache(tmp_path / "cache").decode([9, 9]), want)


def test_scales_that_cut_values_off_are_refused(rope: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = calibration.scales_of(rope)
    monkeypatch.setattr(calibration, "scales_of", lambda bundle: [(k / 20, v / 20) for k, v in right])
    with pytest.raises(ExportError, match="keys and values in int8"):
        quantize(rope, tmp_path / "q", bits=None, cache="int8")
    assert not list(tmp_path.iterdir())


def test_what_has_no_such_cache(bundles: Bundles, tmp_path: Path, warm_cli: Cli) -> None:
    with pytest.raises(ConfigError, match="target 'ort'"):
        quantize(bundles("rope", "portable"), tmp_path / "q", cache="int8")
    result = warm_cli("quantize", bundles("rope"), "-o", tmp_path / "q", "--cache", "int4", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "'int4' must be int8" in result.stderr


def test_calibration_takes_a_text_where_there_is_a_tokenizer(rope: Bundle) -> None:
    assert len(calibration.TEXT.read_text("utf-8")) > 1500
    tokens = calibration.calibration_tokens(rope)
    assert len(tokens) == calibration.TOKENS
    assert set(tokens) <= set(range(256))


def test_long_prompts_take_their_own_graph(rounded: Bundle) -> None:
    session = Session(rounded, threads=1)
    assert session.for_tokens(1) is session
    assert session.for_tokens(OPENING_TOKENS - 1) is session
    prompts = session.for_tokens(OPENING_TOKENS)
    assert prompts.model.name == PROMPT
    assert session.for_tokens(PROMPT_TOKENS) is prompts
    assert session.for_tokens(PROMPT_TOKENS - 1) is session
    levels = {
        name: {
            a.i for n in onnx.load(rounded.folder / name).graph.node for a in n.attribute if a.name == "accuracy_level"
        }
        for name in ("model.onnx", PROMPT)
    }
    assert levels == {"model.onnx": {4}, PROMPT: {1, 4}}  # the head multiplies the last token alone


def test_both_graphs_fill_one_cache(rounded: Bundle, tmp_path: Path) -> None:
    """A prompt in one run, and in short ones that the graph for steps runs; a bundle without the other graph too."""
    ids = np.random.default_rng(6).integers(0, 256, OPENING_TOKENS + 8).tolist()
    alone = shutil.copytree(rounded.folder, tmp_path / "alone")
    (alone / PROMPT).unlink()
    made = []
    for bundle, chunk in ((rounded, 256), (rounded, PROMPT_TOKENS - 8), (Bundle(alone, rounded.manifest), 256)):
        cache = make_cache(Session(bundle, threads=1), 1, 256, chunk)
        made.append(np.stack([cache.prefill([ids])[0].copy(), cache.decode([5])[0].copy()]))
    for other in made[1:]:
        error = np.sqrt(np.square(made[0] - other).mean()) / other.std()
        assert 0 < error < 0.05  # of activations that are rounded


def test_export_rounds_at_once(tmp_path: Path, warm_cli: Cli) -> None:
    result = warm_cli(
        "export", "--encoding", "none", "-o", tmp_path / "q", "--bits", "8", "--cache", "int8", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    held = read_bundle(tmp_path / "q").quantization
    assert held is not None
    assert (held["bits"], held["cache"]) == (8, "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    result = warm_cli("export", "--encoding", "none", "-o", tmp_path / "other", "--block", "32", cwd=tmp_path)
    assert result.returncode == 2
    assert "--block is for --bits" in result.stderr
