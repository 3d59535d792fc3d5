"""`pe-onnx quantize`: the rounding itself, what runs it, what the bundle holds, and what is refused."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import snapshot
from onnxruntime.capi import _pybind_state as ort_quantizer

from pe_onnx import block_quantization, quantization, writing
from pe_onnx.block_quantization import Blocks, dequantize_blocks, quantize_blocks, relative_error
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import ConfigError, ExportError
from pe_onnx.parity import check_parity
from pe_onnx.passes import quantized_weights
from pe_onnx.passes.quantized_weights import QuantizedWeights, Rounding, rounded_weights
from pe_onnx.quantization import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDINGS = list(itertools.product((4, 8), (16, 32, 64, 128), (True, False)))


def matrix(N: int, K: int, seed: int = 0) -> Any:
    """Rows of different sizes, a few weights far out."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((N, K)) * np.exp(0.5 * rng.standard_normal((N, 1)))
    w[rng.random((N, K)) < 0.002] *= 6
    return w.astype(np.float32)


def by_onnxruntime(w: Any, bits: int, block: int, symmetric: bool) -> Any:
    """The weights that onnxruntime's own quantizer leaves."""
    N, K = w.shape
    count = K // block
    packed, scales = np.zeros((N, count, block * bits // 8), np.uint8), np.zeros((N, count), np.float32)
    zeros = np.zeros((N, -(-count * bits // 8)), np.uint8)
    own = ort_quantizer.quantize_matmul_4bits if bits == 4 else ort_quantizer.quantize_matmul_8bits
    own(packed, np.ascontiguousarray(w.T), scales, zeros, block, N, K, symmetric)
    return dequantize_blocks(Blocks(packed, scales, None if symmetric else zeros), bits)


@pytest.mark.parametrize(("bits", "block", "symmetric"), ROUNDINGS)
def test_the_error_is_no_worse_than_that_of_onnxruntimes_quantizer(bits: int, block: int, symmetric: bool) -> None:
    w = matrix(37, 384)
    ours = relative_error(w, dequantize_blocks(quantize_blocks(w, bits, block, symmetric), bits))
    theirs = relative_error(w, by_onnxruntime(w, bits, block, symmetric))
    assert ours <= 1.001 * theirs
    if bits == 4 and symmetric:
        assert ours < 0.97 * theirs


@pytest.mark.parametrize("w", [np.zeros((3, 32)), np.full((3, 32), 0.7), -np.abs(matrix(3, 32)), np.eye(3, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_that_are_special(w: Any, bits: int, symmetric: bool) -> None:
    """Zeros stay zeros, and a block of one value or one sign keeps within a step."""
    w = w.astype(np.float32)
    rounded = dequantize_blocks(quantize_blocks(w, bits, 16, symmetric), bits)
    assert np.isfinite(rounded).all()
    assert np.array_equal(rounded[w == 0], w[w == 0])
    assert np.abs(rounded - w).max() <= np.abs(w).max() * 1.3 / (1 << (bits - 1))


def lookup_and_product(table: Any, weight: Any) -> ir.Model:
    """``input_ids`` int64 ``[T]`` to rows of a table, and these times ``weight`` ``[K, N]``."""
    values = [ir.Value(name=n, const_value=ir.tensor(x, name=n)) for n, x in (("table", table), ("weight", weight))]
    for value in values:
        value.shape, value.type = value.const_value.shape, ir.TensorType(ir.DataType.FLOAT)
    ids = ir.Value(name="input_ids", shape=ir.Shape(["T"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [values[0], ids], name="gather")
    product = ir.node("MatMul", [gather.outputs[0], values[1]], name="product")
    for node, name, width in ((gather, "rows", table.shape[1]), (product, "y", weight.shape[1])):
        node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(["T", width])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    outputs = [gather.outputs[0], product.outputs[0]]
    graph = ir.Graph([ids], outputs, nodes=[gather, product], initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("bits", "block", "symmetric"), ROUNDINGS)
def test_onnxruntime_computes_with_the_dequantized_weights(bits: int, block: int, symmetric: bool) -> None:
    model = lookup_and_product(matrix(41, 128), matrix(24, 128, 1).T)
    assert QuantizedWeights(Rounding(bits, block, symmetric, 4))(model).modified
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "MatMulNBits"]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rows, y = session.run(None, {"input_ids": np.arange(41)})
    weights = {name: make() for name, make in rounded_weights(model).items()}
    assert np.array_equal(rows, weights["table"])
    want = weights["table"].astype(np.float64) @ weights["weight"].T
    assert np.abs(y - want).max() <= 1e-6 * np.abs(want).max()


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in a file of their own, however small they are."""
    monkeypatch.setattr(quantization, "EMBED_BELOW_BYTES", 0)


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_tied_head_stands_in_the_file_once(bundles: Bundles, tmp_path: Path, target: str) -> None:
    held = {}
    for tied in (True, False):
        made = quantize(
            bundles("rope", target, config={"tie_word_embeddings": tied}), tmp_path / str(tied), verify=tied
        )
        held[tied] = (made.folder / "model.onnx.data").stat().st_size
        graph = ir.load(made.model).graph
        (lookup,) = [node for node in graph if node.op_type == "GatherBlockQuantized"]
        products = [node for node in graph if node.op_type == "MatMulNBits"]
        table, head = lookup.inputs[0].const_value, products[-1].inputs[1].const_value
        assert isinstance(table, ir.ExternalTensor)
        assert isinstance(head, ir.ExternalTensor)
        assert ((table.location, table.offset) == (head.location, head.offset)) is tied
    config = read_bundle(tmp_path / "True").manifest["source"]["config"]
    parameters = config["vocab_size"] * config["hidden_size"]
    assert abs(held[False] - held[True] - parameters * 9 // 8) < 8192  # 8 bits and a 32nd of a scale; pages


@pytest.mark.parametrize(
    "options", [{"dtype": "fp16"}, {"target": "portable"}, {"target": "portable", "dtype": "fp16"}]
)
def test_other_dtypes_and_targets(bundles: Bundles, tmp_path: Path, options: dict[str, Any]) -> None:
    made = quantize(bundles("alibi", **options), tmp_path / "q", symmetric=False)
    assert made.manifest["proof"]["verified"]
    report = check_parity(made.folder, modes=["whole", "ragged"])
    assert report.passed
    assert report.reference.endswith("with the rounded weights")


def test_activations_in_float_are_held_to_the_dtypes_rule(bundles: Bundles, tmp_path: Path) -> None:
    made = quantize(bundles("rope"), tmp_path / "q", accuracy_level=1)
    report = check_parity(made.folder)
    assert report.passed
    assert report.tolerance.error < 1e-4
    assert report.tolerance.rule.startswith("fp32")


def test_excluded_weights_keep_their_precision(bundles: Bundles, tmp_path: Path) -> None:
    made = quantize(bundles("rope"), tmp_path / "q", exclude=["*.head.*", "*blocks.1.mlp*"])
    kept = made.manifest["quantization"]["kept"]
    assert len(kept) == 3  # gate and up are one
    assert {name.split(".")[1] for name in kept} == {"head", "blocks"}
    weights = rounded_weights(ir.load(made.model))
    assert not set(kept) & set(weights)
    assert len(weights) == made.manifest["quantization"]["weights"]
    initializers = ir.load(made.model).graph.initializers
    before = ir.load(read_bundle(bundles("rope")).model).graph.initializers
    for name in kept:
        assert np.array_equal(initializers[name].const_value.numpy(), before[name].const_value.numpy())
    assert check_parity(made.folder, modes=["whole"]).passed


@pytest.mark.usefixtures("external")
def test_weights_are_rounded_one_at_a_time(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was read and what was made before nothing is alive when the next matrix is rounded."""
    alive: list[int] = []
    seen: list[Any] = []

    def watched(weight: Any, *args: Any) -> Blocks:
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        blocks = quantize_blocks(weight, *args)
        seen.extend(weakref.ref(array) for array in (weight, *filter(lambda x: x is not None, blocks)))
        return blocks

    monkeypatch.setattr(quantized_weights, "quantize_blocks", watched)
    monkeypatch.setattr(writing, "EXTERNAL_FROM_BYTES", 1)  # scales of tiny matrices too
    made = quantize(bundles("rope"), tmp_path / "q", symmetric=False, verify=False)
    assert len(alive) == made.manifest["quantization"]["weights"]
    assert alive == [0] * len(alive)


MISTAKES: dict[str, list[str]] = {
    "--bits 3": ["bits = 3 must be one of 4, 8"],
    "--block 48": ["block = 48 must be one of 16, 32"],
    "--block 128": ["block = 128 does not divide", "--block", "--exclude"],
    "--accuracy-level 3": ["accuracy_level = 3 must be 1 or 4"],
    "--exclude *.haed.*": ["exclude = '*.haed.*' matches no weight"],
    "--exclude *": ["no weight is left"],
    "--bits four": ["'four'"],
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(bundles: Bundles, warm_cli: Cli, tmp_path: Path, options: str) -> None:
    result = warm_cli("quantize", bundles("rope"), "-o", "q", *options.split(), cwd=tmp_path)
    refused(result, 2, *MISTAKES[options])
    assert not list(tmp_path.iterdir())


def test_twice_and_over_another_are_refused(bundles: Bundles, warm_cli: Cli, tmp_path: Path) -> None:
    made = warm_cli("quantize", bundles("rope"), "-o", "q", "--no-verify", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    before = snapshot(tmp_path)
    twice = warm_cli("quantize", "q", "-o", "qq", cwd=tmp_path)
    refused(twice, 2, "is quantized already", "the one it was made from")
    again = warm_cli("quantize", bundles("rope"), "-o", "q", cwd=tmp_path)
    refused(again, 2, "q", "--force")
    assert snapshot(tmp_path) == before


def test_bfloat16_is_refused(bundles: Bundles, warm_cli: Cli, tmp_path: Path) -> None:
    for options in ("--bits 4", "--bits 0 --cache int8"):
        result = warm_cli("quantize", bundles("rope", dtype="bf16"), "-o", "q", *options.split(), cwd=tmp_path)
        refused(result, 2, "is in bf16, which no CPU runs", "quantize one in fp16 or fp32")
    assert not list(tmp_path.iterdir())


def test_the_proof_does_not_take_our_word(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we read another zero point than onnxruntime computes with, nothing is written."""

    def off_by_one(blocks: Blocks, bits: int) -> Any:
        rounded = dequantize_blocks(blocks, bits)
        return rounded - np.repeat(blocks.scales, rounded.shape[1] // blocks.scales.shape[1], 1)

    monkeypatch.setattr(block_quantization, "dequantize_blocks", off_by_one)
    with pytest.raises(ExportError, match=r"does not compute what .* computes with the rounded weights"):
        quantize(bundles("rope"), tmp_path / "q")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_a_killed_run_leaves_no_bundle(bundles: Bundles, tmp_path: Path, stage: str) -> None:
    code = (
        "import os, sys; from pe_onnx.quantization import quantize; "
        "quantize(sys.argv[1], sys.argv[2], progress=lambda stage: os._exit(9) if stage == sys.argv[3] else None)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(bundles("rope")), str(tmp_path / "q"), stage])
    assert result.returncode == 9
    assert not (tmp_path / "q").exists()
    assert all(path.name.startswith(".q.partial-") for path in tmp_path.iterdir())
    quantize(bundles("rope"), tmp_path / "q", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for options in ({"bits": 5}, {"block": 24}, {"accuracy_level": 2}):
        with pytest.raises(ConfigError, match="must be"):
            quantize(tmp_path / "none", tmp_path / "q", **options)  # type: ignore[arg-type]


def test_what_is_said_of_it(bundles: Bundles, tmp_path: Path) -> None:
    opened: Callable[[Path], Bundle] = read_bundle
    made = quantize(bundles("rope"), tmp_path / "q", bits=8, block=16, symmetric=False, verify=False)
    held = opened(made.folder).quantization
    assert held is not None
    assert (held["bits"], held["block"], held["symmetric"], held["accuracy_level"]) == (8, 16, False, 4)
    assert held["bits_per_weight"] == 8 + (32 + 8) / 16
    assert made.manifest["proof"] == {"verified": False}
