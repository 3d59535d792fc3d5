"""The exported file, whole: custom functions as nodes with bodies, run by onnx's own reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from pe_onnx.bundle import read_bundle
from pe_onnx.contract import past_names

FUNCTIONS = {"none": set(), "rope": {"RotaryEmbedding"}, "t5_bias": {"T5RelativeBias"}, "alibi": {"AlibiBias"}}


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("encoding", FUNCTIONS)
def test_the_file_holds_its_functions(bundles: Callable[..., Path], encoding: str, target: str) -> None:
    model = onnx.load(bundles(encoding, target) / "model.onnx")
    attention = "CachedAttention" if target == "ort" else "MaskedAttention"
    wanted = {("pe_onnx", name) for name in FUNCTIONS[encoding] | {attention}}
    assert {(node.domain, node.op_type) for node in model.graph.node if node.domain == "pe_onnx"} == wanted
    assert {node.domain for node in model.graph.node} - {"", "pe_onnx"} == (
        {"com.microsoft"} if target == "ort" else set()
    )
    assert {(function.domain, function.name) for function in model.functions} == wanted
    assert all(len(function.node) > 0 for function in model.functions)


@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("encoding", FUNCTIONS)
def test_the_reference_evaluator_agrees_with_onnxruntime(
    bundles: Callable[..., Path], encoding: str, past: int
) -> None:
    """A left-padded batch, without and with a cache."""
    folder = bundles(encoding, "portable")
    model = onnx.load(folder / "model.onnx")
    caches = read_bundle(folder).caches
    rng = np.random.default_rng(0)
    mask = np.ones((2, past + 7), np.int64)
    mask[1, :3] = 0
    feeds = {
        "input_ids": rng.integers(0, 256, (2, 7)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
    }
    for name, (K, D) in zip(past_names(len(caches)), (c for c in caches for _ in range(2)), strict=True):
        feeds[name] = rng.standard_normal((2, K, past, D), np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(["logits"], feeds)[0]
    logits = ReferenceEvaluator(model).run(["logits"], feeds)[0]
    valid = mask[:, past:] == 1
    assert np.abs(logits - expected)[valid].max() < 1e-4 * expected.std()
