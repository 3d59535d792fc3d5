"""Products whose weights are unpacked when they are loaded, against MatMulNBits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import Bundles, Shared

from pe_onnx.passes.unpacked_products import UnpackedProducts
from pe_onnx.quantization import quantize


def logits(path: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path)
    T = 13
    feeds: dict[str, Any] = {
        "input_ids": np.arange(T)[None] * 7 % 256,
        "attention_mask": np.ones((1, T), np.int64),
        "position_ids": np.arange(T)[None],
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 4, "symmetric": False}])
def test_unpacked(
    options: dict[str, Any], embedded: bool, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not embedded:
        monkeypatch.setattr("pe_onnx.quantization.EMBED_BELOW_BYTES", 0)
        monkeypatch.setattr("pe_onnx.writing.EXTERNAL_FROM_BYTES", 256)
    source = bundles("rope", "ort", preset="tiny", config={"tie_word_embeddings": False})
    quantize(source, tmp_path / "q", accuracy_level=1, verify=False, **options)
    assert (tmp_path / "q/model.onnx.data").exists() != embedded
    model, unpack = ir.load(tmp_path / "q/model.onnx"), UnpackedProducts()
    assert unpack(model).modified
    assert not any(node.op_type == "MatMulNBits" for node in model.graph)
    ir.save(model, tmp_path / "q/unpacked.onnx")
    want, got = logits(tmp_path / "q/model.onnx"), logits(tmp_path / "q/unpacked.onnx")
    assert np.abs(got - want).max() < 2e-5 * want.std()
    sizes = [node.attributes for node in ir.load(tmp_path / "q/model.onnx").graph if node.op_type == "MatMulNBits"]
    assert unpack.unpacked_bytes == sum(4 * a.get_int("N") * a.get_int("K") for a in sizes)
    assert not unpack(model).modified


def test_a_wrong_zero_point_would_show(shared: Shared, bundles: Bundles, tmp_path: Path) -> None:
    source = bundles("rope", "ort", preset="tiny", config={"tie_word_embeddings": False})
    quantize(source, tmp_path / "q", accuracy_level=1, verify=False)
    model = ir.load(tmp_path / "q/model.onnx")
    UnpackedProducts()(model)
    zero = model.graph.initializers["pe_onnx_zero_point_8_FLOAT"]
    zero.const_value = ir.tensor(np.array(7, np.float32), name=zero.name)
    ir.save(model, tmp_path / "q/unpacked.onnx")
    want, got = logits(tmp_path / "q/model.onnx"), logits(tmp_path / "q/unpacked.onnx")
    assert np.abs(got - want).max() > 0.1 * want.std()
