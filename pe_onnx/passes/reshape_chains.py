"""Reshape after Reshape, as modules leave them that take heads apart and put them together again."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import drop, made_by, numbers, replace, same_shape


class ReshapeChains(ir.passes.InPlacePass):
    """A Reshape reads past the Reshapes before it, and goes where it then gives back the shape that it reads.

    A target shape that may copy a size of its input (a 0 with ``allowzero`` 0) reads past nothing: the copied size
    would be another's. A Reshape that makes an output of the graph keeps its place.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != ("", "Reshape") or node.graph is None:
                continue
            before = node.inputs[0]
            source, output = before, node.outputs[0]
            while (earlier := made_by(source, "Reshape")) is not None:
                source = earlier.inputs[0]
            assert source is not None
            if same_shape(source, output) and not output.is_graph_output():
                replace(output, source)
                modified = True
            elif source is not before and not self._may_copy(node):
                node.replace_input_with(0, source)
                drop(before)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _may_copy(self, node: ir.Node) -> bool:
        if "allowzero" in node.attributes and node.attributes["allowzero"].as_int():
            return False
        target = numbers(node.inputs[1])
        return target is None or 0 in target
