"""Cosines and sines of every frequency once, where a model repeats each and one of the two is sliced out again."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from pe_onnx.passes.nodes import attribute, is_last, made_by, numbers, part, readers, replace, same_size, sizes

ELEMENTWISE = ("Cos", "Sin", "Neg", "Cast", "Mul")


class Repeated(NamedTuple):
    """A value whose last axis holds each channel of a narrower one twice."""

    narrow: ir.Value
    in_pairs: bool
    """As a a b b; otherwise as a b a b."""
    chain: list[ir.Node]
    """The elementwise nodes from the value down to where the repetition is made, last first."""


def repeated(value: ir.Value | None) -> Repeated | None:
    """How ``value`` repeats, read off the nodes that make it: the cosine of a repetition repeats likewise."""
    chain: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and not node.domain:
        if node.op_type in ELEMENTWISE:
            if node.op_type == "Mul" and len(numbers(node.inputs[1]) or ()) != 1:
                return None
            chain.append(node)
            value = node.inputs[0]
            continue
        if node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]:
            narrow = node.inputs[0]
            if narrow is not None and is_last(attribute(node, "axis", 0), value):
                return Repeated(narrow, False, chain)
            return None
        narrow = interleaved(node)
        return None if narrow is None else Repeated(narrow, True, chain)
    return None


def interleaved(node: ir.Node) -> ir.Value | None:
    """x of ``Reshape(Expand(Unsqueeze(x, -1), [1, .., 1, 2]))`` that doubles the last size, else None."""
    expand = made_by(node.inputs[0], "Expand") if node.op_type == "Reshape" else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None:
        return None
    x, wide = sizes(unsqueeze.inputs[0]), sizes(node.outputs[0])
    if not x or not wide or len(x) != len(wide) or not isinstance(x[-1], int) or wide[-1] != 2 * x[-1]:
        return None
    if not all(map(same_size, x[:-1], wide[:-1])):
        return None
    if numbers(unsqueeze.inputs[1]) not in ([-1], [len(x)]) or numbers(expand.inputs[1]) != [1] * len(x) + [2]:
        return None
    return unsqueeze.inputs[0]


class SlicedTables(ir.passes.InPlacePass):
    """``Slice(Cos(repetition of x))`` that takes each channel once to ``Cos(x)``, and for Sin, Neg, Cast likewise.

    Not where the wide table is read elsewhere too: it would then be computed twice.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("", "Slice") and node.graph is not None:
                modified |= self._narrow(node)
        return ir.passes.PassResult(model, modified)

    def _narrow(self, node: ir.Node) -> bool:
        taken, found = part(node.outputs[0]), repeated(node.inputs[0])
        if taken is None or found is None or node.outputs[0].is_graph_output():
            return False
        shape = sizes(found.narrow)
        if not shape or not isinstance(half := shape[-1], int):
            return False
        if found.in_pairs:
            once = taken.step == 2 and taken.start in (0, 1) and taken.stop > 2 * half - 2 + taken.start
        else:
            once = taken.step == 1 and (taken.start, taken.stop) in ((0, half), (half, 2 * half))
        if not once or any(len(readers(link.outputs[0])) != 1 for link in found.chain):
            return False
        assert node.graph is not None
        value = found.narrow
        for link in reversed(found.chain):
            copy = ir.node(link.op_type, [value, *link.inputs[1:]], attributes=link.attributes)
            value = copy.outputs[0]
            value.shape, value.type = ir.Shape(shape), link.outputs[0].type
            node.graph.insert_before(node, copy)
        replace(node.outputs[0], value)
        return True
