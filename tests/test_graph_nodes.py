"""The reader of ONNX files against the onnx package, and on what is no ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Bundles
from onnx import TensorProto, helper, numpy_helper

from pe_onnx.errors import BundleError
from pe_onnx.graph_nodes import read_graph


@pytest.mark.parametrize(("encoding", "target"), [("t5_bias", "ort"), ("rope", "portable")])
def test_it_reads_what_the_onnx_package_reads(bundles: Bundles, encoding: str, target: str) -> None:
    path = bundles(encoding, target) / "model.onnx"
    graph, model = read_graph(path), onnx.load(path, load_external_data=False)
    assert [node[:3] for node in graph.nodes] == [(n.name, n.op_type, n.domain) for n in model.graph.node]
    assert [node[3:] for node in graph.nodes] == [(tuple(n.input), tuple(n.output)) for n in model.graph.node]
    assert graph.inputs == [value.name for value in model.graph.input]
    assert graph.outputs == [value.name for value in model.graph.output]
    assert graph.functions == {f.name: list(f.input) for f in model.functions}
    floating = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
    assert graph.initializers == {
        t.name: t.data_type in floating and int(np.prod(t.dims, dtype=int)) > 1 for t in model.graph.initializer
    }
    assert any(graph.initializers.values())


def test_a_subgraph_reads_from_outside(tmp_path: Path) -> None:
    def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [2])

    inner = helper.make_node("Add", ["outer", "own"], ["sum"])
    own = numpy_helper.from_array(np.ones(2, np.float32), "own")
    branch = helper.make_graph([inner], "branch", [], [value("sum")], [own])
    other = helper.make_graph([helper.make_node("Neg", ["far"], ["out"])], "other", [], [value("out")])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=other, name="choice")
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    inputs = [condition, value("outer"), value("far")]
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, [value("y")])), tmp_path / "m.onnx")
    (read,) = read_graph(tmp_path / "m.onnx").nodes
    assert set(read.inputs) == {"condition", "outer", "far"}


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x3a\xff\xff\xff\xff\x0f", b"\x08"])
def test_what_is_no_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read as an ONNX model") as error:
        read_graph(path)
    assert "\n" not in str(error.value)


def test_every_truncation_is_refused_or_read(bundles: Bundles, tmp_path: Path) -> None:
    content = (bundles("rope") / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for length in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(BundleError):
            read_graph(path)
