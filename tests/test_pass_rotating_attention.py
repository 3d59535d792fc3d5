"""RotatingAttention: the same numbers, to the bit, with queries and keys rotated inside; and ``runtime.onnx``,
the graph that has it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Bundles
from graphs import counts

import pe_onnx
from pe_onnx.bundle import MODEL, RUNTIME, read_bundle
from pe_onnx.kv_cache import make_cache
from pe_onnx.parity import check_parity
from pe_onnx.passes.rotating_attention import RotatingAttention
from pe_onnx.quantization import quantize
from pe_onnx.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12288}
"""More than a megabyte of weights: they are a file beside the graphs."""


def rotated(folder: Path) -> tuple[ir.Model, RotatingAttention]:
    model, made = ir.load(folder / MODEL), RotatingAttention()
    made(model)
    return model, made


def logits(folder: Path, graph: str) -> np.ndarray[Any, Any]:
    """Ragged batches, of more tokens in all than a row holds and of more rows than tokens, single steps, and chunks."""
    rng, made = np.random.default_rng(0), []
    session = Session(read_bundle(folder, verify=False), graph=graph, threads=1)
    for lengths in ((4, 1, 30), (2,) * 9):
        cache = make_cache(session, len(lengths), 40)
        made += cache.prefill([rng.integers(0, 200, n).tolist() for n in lengths])
        for _ in range(6):
            made += list(cache.decode(rng.integers(0, 200, len(lengths))).copy())
    cache = make_cache(session, 1, 64, chunk_tokens=7)
    made += cache.prefill([rng.integers(0, 200, 40).tolist()])
    return np.stack(made)


@pytest.mark.parametrize("encoding", ["rope", "rope_interleaved", "rope_yarn", "rope_dynamic"])
def test_the_numbers_stay(bundles: Bundles, encoding: str, tmp_path: Path) -> None:
    folder = bundles(encoding, "ort")
    model, made = rotated(folder)
    layers = len(read_bundle(folder).caches)
    assert made.rotated == layers
    before, after = counts(ir.load(folder / MODEL)), counts(model)
    assert (before["RotaryEmbedding"], before["CachedAttention"]) == (2 * layers, layers)
    assert (after["RotaryEmbedding"], after["CachedAttention"], after["GroupQueryAttention"]) == (0, 0, layers)
    assert before["Split"] - after["Split"] == layers
    copy = shutil.copytree(folder, tmp_path / "copy")
    ir.save(model, copy / "other.onnx")
    have, want = logits(copy, "other.onnx"), logits(copy, MODEL)
    assert np.ptp(want) > 1
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("encoding", ["none", "alibi", "t5_bias", "rope_partial", "xpos"])
def test_what_rotates_otherwise_stays(bundles: Bundles, encoding: str) -> None:
    folder = bundles(encoding, "ort")
    model, made = rotated(folder)
    assert made.rotated == 0
    assert counts(model) == counts(ir.load(folder / MODEL))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "b"
    pe_onnx.export(encoding="rope", output=folder, config=LARGE)
    return folder


def test_the_runtime_has_a_graph_of_its_own(large: Path) -> None:
    bundle = read_bundle(large)
    assert RUNTIME in bundle.manifest["files"]
    assert Session(bundle).model.name == RUNTIME
    assert Session(bundle, graph=MODEL).model.name == MODEL
    assert counts(ir.load(large / RUNTIME))["RotaryEmbedding"] == 0
    np.testing.assert_array_equal(logits(large, RUNTIME), logits(large, MODEL))
    assert check_parity(large, tokens=40).passed


def test_a_profile_is_of_the_graph_that_shows_the_encoding(large: Path, tmp_path: Path) -> None:
    assert Session(read_bundle(large), profile=tmp_path / "p").model.name == MODEL


def test_quantized_bundles_have_one_too(large: Path, tmp_path: Path) -> None:
    quantize(large, tmp_path / "q")
    assert counts(ir.load(tmp_path / "q" / RUNTIME))["MatMulNBits"] > 0
    np.testing.assert_array_equal(logits(tmp_path / "q", RUNTIME), logits(tmp_path / "q", MODEL))
    quantize(large, tmp_path / "c", bits=None, cache="int8")
    assert not (tmp_path / "c" / RUNTIME).exists()  # its attention is another


def test_other_targets_and_dtypes_have_none(tmp_path: Path) -> None:
    pe_onnx.export(encoding="rope", output=tmp_path / "p", config=LARGE, target="portable")
    pe_onnx.export(encoding="rope", output=tmp_path / "h", config=LARGE, dtype="fp16")
    assert not [path for name in "ph" for path in (tmp_path / name).glob(RUNTIME)]
