"""A rotation spelled out, as a modeling file writes it, to our operator."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from pe_onnx.custom_ops.rotary_embedding import RotaryEmbedding
from pe_onnx.passes.nodes import (
    Part,
    Size,
    attribute,
    constant,
    insert,
    is_last,
    made_by,
    numbers,
    part,
    replace,
    same_shape,
    same_size,
    sizes,
)
from pe_onnx.passes.sliced_tables import interleaved, repeated


class Turned(NamedTuple):
    """A value by a quarter turn: ``(-b, a)`` of each pair ``(a, b)``, or ``(b, -a)``."""

    source: ir.Value
    in_pairs: bool
    backwards: bool


class FusedRotation(ir.passes.InPlacePass):
    """``x cos + turned(x) sin`` to RotaryEmbedding, half-split or interleaved, in either direction.

    x is ``[B, H, T, R]``; cos and sin are tables ``[B, 1, T, R]`` which are seen to hold each frequency twice, in the
    layout that the turn has. What is not seen to be all this stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.tables: dict[tuple[object, ...], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("", "Add") and node.graph is not None:
                modified |= self._fuse(model.graph, node)
        if modified:
            function = ir.serde.deserialize_function(RotaryEmbedding.to_function_proto())
            model.functions.setdefault(function.identifier(), function)
            model.opset_imports.setdefault(function.domain, 1)
        return ir.passes.PassResult(model, modified)

    def _fuse(self, graph: ir.Graph, add: ir.Node) -> bool:
        first, second = (made_by(value, "Mul") for value in add.inputs)
        if first is None or second is None or add.outputs[0].is_graph_output():
            return False
        for straight, across in ((first, second), (second, first)):
            for y, sin in _orders(across):
                turn = self._turned(y)
                if turn is None:
                    continue
                for x, cos in _orders(straight):
                    if x is turn.source and self._rotate(graph, add, turn, cos, sin):
                        return True
        return False

    def _rotate(self, graph: ir.Graph, add: ir.Node, turn: Turned, cos: ir.Value, sin: ir.Value) -> bool:
        shape = sizes(turn.source)
        if shape is None or len(shape) != 4 or not isinstance(shape[-1], int) or cos.dtype != turn.source.dtype:
            return False
        R = shape[-1]
        found = [_narrow_table(table, R, turn) for table in (cos, sin)]
        if found[0] is None or found[1] is None:
            return False
        narrow = [self._slice(graph, add, *taken, R) for taken in (found[0], found[1])]
        if turn.backwards:
            narrow[1] = self._once(("Neg", narrow[1]), add, "Neg", [narrow[1]], sizes(narrow[1]) or [])
        attributes = {"num_heads": 0, "interleaved": int(turn.in_pairs), "rotary_dim": R}
        rotated = insert(add, "RotaryEmbedding", [turn.source, *narrow], shape, attributes, "pe_onnx")
        replace(add.outputs[0], rotated)
        return True

    def _slice(self, graph: ir.Graph, add: ir.Node, table: ir.Value, stop: int, step: int, R: int) -> ir.Value:
        bounds = [constant(graph, [value]) for value in (0, stop, 2, step)]
        size = [*(sizes(table) or [])[:2], R // 2]
        return self._once((table, stop, step), add, "Slice", [table, *bounds], size)

    def _once(
        self, key: tuple[object, ...], before: ir.Node, op_type: str, inputs: list[ir.Value], shape: list[Size]
    ) -> ir.Value:
        """A node for all layers: they stand behind the first, in whose place it is made."""
        if key not in self.tables:
            self.tables[key] = insert(before, op_type, inputs, shape)
        return self.tables[key]

    def _turned(self, value: ir.Value) -> Turned | None:
        concat, in_pairs = made_by(value, "Concat"), False
        if (reshape := made_by(value, "Reshape")) is not None:
            concat, in_pairs = made_by(reshape.inputs[0], "Concat"), True
        if concat is None or len(concat.inputs) != 2 or not is_last(attribute(concat, "axis", 0), concat.outputs[0]):
            return None
        halves = list(concat.inputs)
        if in_pairs:
            apart = [made_by(half, "Unsqueeze") for half in halves]
            if not all(node is not None and numbers(node.inputs[1]) in ([-1], [4]) for node in apart):
                return None
            halves = [node.inputs[0] for node in apart if node is not None]
        negated = [made_by(half, "Neg") for half in halves]
        if (negated[0] is None) == (negated[1] is None):
            return None
        parts = [part(node.inputs[0] if node is not None else half) for node, half in zip(negated, halves, strict=True)]
        if parts[0] is None or parts[1] is None or parts[0].source is not parts[1].source:
            return None
        source = parts[0].source
        R = (sizes(source) or [0])[-1]
        if not isinstance(R, int) or R % 2 or not same_shape(source, value):
            return None
        ends = (R - 1, R) if in_pairs else (R // 2, R)
        a = Part(source, 0, ends[0], 2) if in_pairs else Part(source, 0, ends[0], 1)
        b = Part(source, 1, R, 2) if in_pairs else Part(source, ends[0], R, 1)
        if [_exact(p) for p in parts if p is not None] != [_exact(b), _exact(a)]:
            return None
        return Turned(source, in_pairs, backwards=negated[0] is None)


def _narrow_table(wide: ir.Value, R: int, turn: Turned) -> tuple[ir.Value, int, int] | None:
    """The table ``[B, T, R]`` behind ``[B, 1, T, R]``, and the stop and step that take each frequency once."""
    shape, x = sizes(wide), sizes(turn.source) or []
    if shape is None or len(shape) != 4 or shape[1] != 1 or shape[-1] != R:
        return None
    if not (same_size(shape[0], x[0]) and same_size(shape[2], x[2])):  # the operator does not broadcast a table
        return None
    node = wide.producer()
    narrow = interleaved(node) if node is not None and turn.in_pairs else None
    if narrow is not None:  # repeated behind the axis for the heads: the slice before it is all that is needed
        taken = part(narrow)
        table = _without_heads(taken.source) if taken is not None else None
        if taken is None or table is None or (taken.start, taken.stop, taken.step) != (0, R // 2, 1):
            return None
        return table, R // 2, 1
    table = _without_heads(wide)
    found = repeated(table)
    if table is None or found is None or found.in_pairs != turn.in_pairs:
        return None
    return (table, R, 2) if turn.in_pairs else (table, R // 2, 1)


def _exact(p: Part) -> range:
    return range(p.start, p.stop, p.step)


def _orders(mul: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    a, b = (value for value in mul.inputs if value is not None)
    return [(a, b), (b, a)]


def _without_heads(value: ir.Value) -> ir.Value | None:
    """x ``[B, T, R]`` of ``Unsqueeze(x, 1)``."""
    node, shape = made_by(value, "Unsqueeze"), sizes(value)
    if node is None or shape is None or len(shape) != 4 or numbers(node.inputs[1]) not in ([1], [-3]):
        return None
    return node.inputs[0]
