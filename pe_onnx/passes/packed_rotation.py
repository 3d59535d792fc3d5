"""Rotation of packed queries and keys, where a model turns heads to the front for it and back again."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import attribute, constant, insert, is_heads_first, readers, replace, sizes


class PackedRotation(ir.passes.InPlacePass):
    """``Transpose(RotaryEmbedding(Transpose(x)))`` to the same rotation of x as ``[B, T, H*D]``, which needs neither.

    x is ``[B, T, H, D]`` with H and D numbers. The two Reshapes that stand in their place copy nothing, and go where x
    was packed before (``ReshapeChains``). A rotation that anything but such Transposes reads stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("pe_onnx", "RotaryEmbedding") and node.graph is not None:
                modified |= self._pack(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _pack(self, graph: ir.Graph, node: ir.Node) -> bool:
        x, *tables = node.inputs
        turned = x.producer() if x is not None else None
        back = readers(node.outputs[0])
        if attribute(node, "num_heads", None) != 0 or not is_heads_first(turned) or not back:
            return False
        assert turned is not None
        heads_last = turned.inputs[0]
        shape = sizes(heads_last)
        if heads_last is None or shape is None or len(shape) != 4 or not all(map(is_heads_first, back)):
            return False
        B, T, H, D = shape
        if not (isinstance(H, int) and isinstance(D, int)) or any(t.outputs[0].is_graph_output() for t in back):
            return False
        packed = insert(node, "Reshape", [heads_last, constant(graph, [0, 0, H * D])], [B, T, H * D])
        attributes = {name: attribute(node, name, 0) for name in ("interleaved", "rotary_dim")}
        rotated = insert(
            node, "RotaryEmbedding", [packed, *tables], [B, T, H * D], {"num_heads": H, **attributes}, "pe_onnx"
        )
        unpacked = insert(node, "Reshape", [rotated, constant(graph, [0, 0, H, D])], [B, T, H, D])
        for transpose in back:
            replace(transpose.outputs[0], unpacked)
        return True
