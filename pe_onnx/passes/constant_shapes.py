"""Shapes of Reshapes as constants, in place of Shape and Concat at every step."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.nodes import constant, drop, numbers, same_size, sizes


class ConstantShapes(ir.passes.InPlacePass):
    """A computed target shape to a constant: known sizes, 0 for a size copied in place, or one -1 for what is left.

    It is not done where two sizes are left over, nor with a copied size beside a -1: with an empty tensor what is left
    would be undefined.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != ("", "Reshape") or node.graph is None or numbers(node.inputs[1]):
                continue
            target = self._target(node)
            if target is None:
                continue
            computed = node.inputs[1]
            node.replace_input_with(1, constant(model.graph, target))
            node.attributes.pop("allowzero", None)
            drop(computed)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _target(self, node: ir.Node) -> list[int] | None:
        before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
        if before is None or after is None:
            return None
        target: list[int] = []
        for i, size in enumerate(after):
            if isinstance(size, int):
                if size == 0:
                    return None
                target.append(size)
            else:
                target.append(0 if i < len(before) and same_size(before[i], size) else -1)
        left = target.count(-1)
        return target if left == 0 or (left == 1 and 0 not in target) else None
