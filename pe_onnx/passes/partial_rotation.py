"""Rotation of the first channels of each head, as one operator on the whole head."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import attribute, insert, is_last, made_by, part, replace, sizes


class PartialRotation(ir.passes.InPlacePass):
    """``Concat(RotaryEmbedding(x[..., :R]), x[..., R:])`` to RotaryEmbedding of x with rotary size R.

    x is ``[B, H, T, D]``; the operator passes the channels from R on as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("", "Concat") and len(node.inputs) == 2 and node.graph is not None:
                modified |= self._join(node)
        return ir.passes.PassResult(model, modified)

    def _join(self, concat: ir.Node) -> bool:
        output = concat.outputs[0]
        rotation = made_by(concat.inputs[0], "RotaryEmbedding", "pe_onnx")
        if rotation is None or not is_last(attribute(concat, "axis", 0), output) or output.is_graph_output():
            return False
        rotated, passed = part(rotation.inputs[0]), part(concat.inputs[1])
        if rotated is None or passed is None or rotated.source is not passed.source:
            return False
        shape = sizes(rotated.source)
        if shape is None or len(shape) != 4 or attribute(rotation, "num_heads", None) != 0:
            return False
        R, D = rotated.stop, shape[-1]
        if (rotated.start, rotated.step) != (0, 1) or (passed.start, passed.stop, passed.step) != (R, D, 1):
            return False
        attributes = {name: attribute(rotation, name, 0) for name in ("num_heads", "interleaved", "rotary_dim")}
        inputs = [rotated.source, *rotation.inputs[1:]]
        replace(output, insert(concat, "RotaryEmbedding", inputs, shape, attributes, "pe_onnx"))
        return True
