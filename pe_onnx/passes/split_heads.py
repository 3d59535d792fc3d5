"""Queries, keys and values split before heads are turned to the front, where a model does it after."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import HEADS_FIRST, attribute, drop, insert, is_heads_first, is_last, sizes, take_name


class SplitHeads(ir.passes.InPlacePass):
    """``Split(Transpose(x))`` of channels to a Transpose of each part of ``Split(x)``.

    It costs nothing and lets each part's Transpose go with the rotation or the Transpose behind it. The Transpose in
    front must have no other reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != ("", "Split"):
                continue
            turned = node.inputs[0]
            transpose = turned.producer() if turned is not None else None
            if turned is None or transpose is None or not is_heads_first(transpose) or len(turned.uses()) != 1:
                continue
            if not is_last(attribute(node, "axis", 0), turned) or turned.is_graph_output():
                continue
            parts = list(node.outputs)
            shapes = [sizes(part) for part in parts]
            if any(shape is None or len(shape) != 4 for shape in shapes) or any(p.is_graph_output() for p in parts):
                continue
            self._split_first(node, transpose)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _split_first(self, node: ir.Node, transpose: ir.Node) -> None:
        parts = list(node.outputs)
        split = ir.node(
            "Split", [transpose.inputs[0], *node.inputs[1:]], attributes=node.attributes, num_outputs=len(parts)
        )
        assert node.graph is not None
        node.graph.insert_before(node, split)
        for old, new in zip(parts, split.outputs, strict=True):
            B, H, T, D = sizes(old) or []
            new.shape, new.type = ir.Shape([B, T, H, D]), old.type
            turned = insert(node, "Transpose", [new], [B, H, T, D], {"perm": HEADS_FIRST})
            take_name(turned, old)
            ir.convenience.replace_all_uses_with(old, turned)
        drop(parts[0])
