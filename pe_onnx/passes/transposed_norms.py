"""Norms of each head on packed queries and keys, where a model has heads at the front around its rotation."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import HEADS_FIRST, attribute, drop, insert, is_heads_first, is_last, readers, replace, sizes

NORMS = ("RMSNormalization", "LayerNormalization")


class TransposedNorms(ir.passes.InPlacePass):
    """``RotaryEmbedding(Norm(Transpose(x)))`` to ``RotaryEmbedding(Transpose(Norm(x)))``, and on the other side
    ``Transpose(Norm(rotated))`` to ``Norm(Transpose(rotated))``: the Transposes then stand next to the rotation.

    The norm is over the last axis, its weights are one vector, and no one else reads what is between.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("pe_onnx", "RotaryEmbedding") and attribute(node, "num_heads", 1) == 0:
                modified |= self._before(node) | self._after(node)
        return ir.passes.PassResult(model, modified)

    def _before(self, rotation: ir.Node) -> bool:
        norm = rotation.inputs[0].producer() if rotation.inputs[0] is not None else None
        if norm is None or not _is_norm(norm) or readers(norm.outputs[0]) != [rotation]:
            return False
        turned = norm.inputs[0]
        transpose = turned.producer() if turned is not None else None
        if turned is None or transpose is None or not is_heads_first(transpose) or readers(turned) != [norm]:
            return False
        heads_last, shape = transpose.inputs[0], sizes(turned)
        if heads_last is None or shape is None:
            return False
        B, H, T, D = shape
        normed = _norm(norm, heads_last, [B, T, H, D])
        replace(norm.outputs[0], insert(norm, "Transpose", [normed], shape, {"perm": HEADS_FIRST}))
        return True

    def _after(self, rotation: ir.Node) -> bool:
        rotated = rotation.outputs[0]
        found, shape = readers(rotated), sizes(rotated)
        if shape is None or len(found) != 1 or not _is_norm(found[0]) or found[0].inputs[0] is not rotated:
            return False
        norm = found[0]
        back = readers(norm.outputs[0])
        if len(back) != 1 or not is_heads_first(back[0]) or back[0].outputs[0].is_graph_output():
            return False
        B, H, T, D = shape
        turned = insert(norm, "Transpose", [rotated], [B, T, H, D], {"perm": HEADS_FIRST})
        replace(back[0].outputs[0], _norm(norm, turned, [B, T, H, D]))
        drop(norm.outputs[0])
        return True


def _is_norm(node: ir.Node) -> bool:
    value, weights = node.inputs[0], node.inputs[1:]
    return (
        not node.domain
        and node.op_type in NORMS
        and len(node.outputs) == 1
        and value is not None
        and len(sizes(value) or ()) == 4
        and is_last(attribute(node, "axis", -1), value)
        and all(weight is None or len(sizes(weight) or ()) == 1 for weight in weights)
    )


def _norm(norm: ir.Node, value: ir.Value, shape: list[ir.SymbolicDim | int]) -> ir.Value:
    """The same norm of another value."""
    copy = ir.node(norm.op_type, [value, *norm.inputs[1:]], attributes=norm.attributes)
    copy.outputs[0].shape, copy.outputs[0].type = ir.Shape(shape), norm.outputs[0].type
    assert norm.graph is not None
    norm.graph.insert_before(norm, copy)
    return copy.outputs[0]
