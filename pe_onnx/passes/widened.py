"""A graph in bfloat16 once more in float32, over the same weights: what a CPU can run.

onnxruntime's CPU has no kernels for bfloat16. Every tensor of bfloat16 becomes one of float32 with the same numbers,
and every cast to it one to float32: the graph computes with the weights as they were rounded, and rounds nothing else.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HALF, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class Widened(ir.passes.InPlacePass):
    """Graph, initializers, constants and functions."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == HALF:
                value.const_value = _widened(value.const_value)
                changed = True
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for graph in graphs:
            for node in ir.traversal.RecursiveGraphIterator(graph):
                for name, attribute in list(node.attributes.items()):
                    if node.op_type == "Cast" and name == "to" and attribute.value == HALF:
                        node.attributes[name] = ir.AttrInt64(name, WIDE)
                        changed = True
                    elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == HALF:
                        node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
                        changed = True
                for value in node.outputs:
                    _retype(value)
            for value in (*graph.inputs, *graph.outputs):
                _retype(value)
        for value in model.graph.initializers.values():
            _retype(value)
        return ir.passes.PassResult(model, changed)


def _retype(value: ir.Value) -> None:
    if value.dtype == HALF:
        value.dtype = WIDE


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Read when it is written: one weight in memory at a time."""

    def read() -> ir.Tensor:
        return ir.Tensor(np.asarray(tensor.numpy(), np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=WIDE, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
