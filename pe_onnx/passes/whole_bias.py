"""Biases on the scores whose shapes do not depend on what is computed: for CUDA, which can record such a step.

On a CPU T5RelativeBias and DistanceBias look up what lies near and repeat or slice the rest, by sizes that are read off
positions. On a device that is a copy to the host and back, and no CUDA graph can hold it, while a look-up for every key
costs microseconds::

    bias[b, h, i, j] = table[h, clip(query_position[b, i] - key_position[b, j], least, least + N - 1) - least]
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from pe_onnx.passes.nodes import attribute, constant, insert, sizes, take_place

PE_ONNX = "pe_onnx"
UNKNOWN = ir.SymbolicDim(None)


class WholeBias(ir.passes.InPlacePass):
    """In place of every T5RelativeBias and DistanceBias of the main graph; ``replaced``: how many those were."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph):
            if node.domain == PE_ONNX and node.op_type in ("T5RelativeBias", "DistanceBias"):
                self.replaced += _replace(model.graph, node)
        if self.replaced:
            common.RemoveUnusedFunctionsPass()(model)
        return ir.passes.PassResult(model, modified=bool(self.replaced))


def _replace(graph: ir.Graph, node: ir.Node) -> bool:
    values, queries, keys = node.inputs[:3]
    assert values is not None
    assert queries is not None
    assert keys is not None
    one, two = constant(graph, [1]), constant(graph, [2])
    if node.op_type == "T5RelativeBias":
        count = (sizes(node.inputs[3]) or [UNKNOWN])[0]
        if not isinstance(count, int):
            return False
        greatest = attribute(node, "max_distance", 0)
        least = greatest - count + 1
        rows = insert(node, "Gather", [values, node.inputs[3]], [count, UNKNOWN], {"axis": 0})
        table = insert(node, "Transpose", [rows], [UNKNOWN, count], {"perm": [1, 0]})  # [H, N]
        last = constant(graph, [greatest])
    else:
        table, least = values, 0
        size = insert(node, "Shape", [values], [1], {"start": 1, "end": 2})
        size.type = queries.type
        end = _scalar(node, size)
        step = _scalar(node, one)
        begin = insert(node, "Sub", [end, step], [])
        last = insert(node, "Range", [begin, end, step], [1])  # N - 1, which CUDA has without a copy
    rank3 = [UNKNOWN] * 3
    each = insert(node, "Unsqueeze", [queries, two], rank3)  # [B, T, 1]
    distance = insert(node, "Sub", [each, insert(node, "Unsqueeze", [keys, one], rank3)], rank3)  # [B, T, S]
    at_least = insert(node, "Max", [distance, constant(graph, [least])], rank3)
    index = insert(node, "Min", [at_least, last], rank3)
    if least:
        index = insert(node, "Sub", [index, constant(graph, [least])], rank3)
    by_head = insert(node, "Gather", [table, index], [UNKNOWN] * 4, {"axis": 1})  # [H, B, T, S]
    bias = insert(node, "Transpose", [by_head], [UNKNOWN] * 4, {"perm": [1, 0, 2, 3]})
    take_place(bias, node.outputs[0])
    graph.remove(node, safe=True)
    return True


def _scalar(before: ir.Node, value: ir.Value) -> ir.Value:
    return insert(before, "Squeeze", [value], [])
