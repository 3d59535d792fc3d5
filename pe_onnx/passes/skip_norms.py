"""A residual sum and the norm behind it as one operator: the sum is normalized while it is at hand.

SkipSimplifiedLayerNormalization and SkipLayerNormalization of onnxruntime (domain com.microsoft).
"""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import attribute, made_by, same_shape, sizes, take_place

MICROSOFT = "com.microsoft"
PRODUCTS = ("MatMul", "Gemm")
BEHIND = 6
"""Operators between a layer's last product and its residual sum, at most: a bias, a norm, a factor, a shape."""


class SkipNorms(ir.passes.InPlacePass):
    """``RMSNormalization(a + b)`` or ``LayerNormalization(a + b)``; the sum itself is handed on where others read it.

    a, b ``[B, T, C]`` and the weights have one dtype, and the norm takes the last axis. Sums in which no layer's result
    takes part, as of tokens and positions, stay: they are the encoding's, not the residual's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not node.domain and node.op_type in ("RMSNormalization", "LayerNormalization"):
                modified |= self._fuse(model.graph, node)
        if modified:
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)

    def _fuse(self, graph: ir.Graph, norm: ir.Node) -> bool:
        total = norm.inputs[0]
        add = made_by(total, "Add")
        if add is None or total is None or total.is_graph_output() or len(norm.outputs) != 1:
            return False
        a, b = add.inputs
        weights = norm.inputs[1:]
        shape = sizes(total)
        if a is None or b is None or shape is None or len(shape) != 3 or not same_shape(a, b):
            return False
        if not any(map(_of_a_layer, (a, b))):
            return False
        if attribute(norm, "axis", -1) not in (-1, 2) or attribute(norm, "stash_type", 1) != 1:
            return False
        if any(w is None or w.dtype != total.dtype or len(sizes(w) or ()) != 1 for w in weights):
            return False
        kind = "SkipSimplified" if norm.op_type == "RMSNormalization" else "Skip"
        fused = ir.node(
            f"{kind}LayerNormalization",
            [a, b, *weights],
            {"epsilon": attribute(norm, "epsilon", 1e-5)},
            domain=MICROSOFT,
            num_outputs=4,
            name=norm.name,
        )
        graph.insert_before(add, fused)
        for new, old, node in ((fused.outputs[3], total, add), (fused.outputs[0], norm.outputs[0], norm)):
            take_place(new, old)
            graph.remove(node, safe=True)
        for unused in fused.outputs[1:3]:
            unused.name = ""
        return True


def _of_a_layer(value: ir.Value | None) -> bool:
    """Whether a matrix product is among the last few operators that made it."""
    for _ in range(BEHIND):
        node = value.producer() if value is not None else None
        if node is None or not node.inputs:
            return False
        if node.op_type in PRODUCTS:
            return True
        value = node.inputs[0]
    return False
