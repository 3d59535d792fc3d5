"""Every operator in an exported file: one node, and the ONNX function that it calls."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from op_exports import MODULES, Get
from op_inputs import rotary_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MODULES)
def test_the_file_holds_the_operator_as_a_function_with_a_body(name: str, exported: Get) -> None:
    model = exported(name).model
    own = [node.op_type for node in model.graph.node if node.domain == "pe_onnx"]
    assert own == [MODULES[name][0]]
    (function,) = (f for f in model.functions if f.domain == "pe_onnx")
    assert function.name == MODULES[name][0]
    assert function.node
    assert {o.domain: o.version for o in function.opset_import}[""] == 23
    assert all(node.domain in ("", "com.microsoft") for node in function.node)
    onnx.checker.check_model(model)


@pytest.mark.parametrize("name", ["rotary-packed", "alibi", "t5"])
def test_a_changed_body_is_noticed(name: str, exported: Get) -> None:
    """The comparison is of the function's own body: with another one the same file computes something else."""
    model = exported(name)
    args = rotary_inputs(2, 5, True) if name.startswith("rotary") else MODULES[name][2]
    changed = copy.deepcopy(model.model)
    (function,) = (f for f in changed.functions if f.domain == "pe_onnx")
    for node in function.node:
        if node.op_type == "Sub":
            node.input[0], node.input[1] = node.input[1], node.input[0]
        if node.op_type == "RotaryEmbedding":
            node.input[1], node.input[2] = node.input[2], node.input[1]
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, model.feed(args))
    assert np.abs(got - model.call(*args).numpy()).max() > 0.1
