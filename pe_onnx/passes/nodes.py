"""Reading and building nodes: who made a value, what is constant, which sizes are surely equal.

A size is an integer or a symbol of the exporter; two symbols of one name are equal in every run, an unnamed size is
equal to nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

SMALL = 64
"""Elements of a constant that a pass may look into: a shape, an axis, a bound."""

HEADS_FIRST = [0, 2, 1, 3]
"""The permutation between ``[B, T, H, D]`` and ``[B, H, T, D]``, its own inverse."""

Size = int | ir.SymbolicDim


class Part(NamedTuple):
    """Channels ``start, start + step, ...`` before ``stop`` of a value's last axis."""

    source: ir.Value
    start: int
    stop: int
    step: int


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that computes ``value`` as its only output, if it is of this type."""
    node = value.producer() if value is not None else None
    if node is None or (node.domain, node.op_type) != (domain, op_type) or len(node.outputs) != 1:
        return None
    return node


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``; none for an output of the graph, which someone unknown reads too."""
    return [] if value.is_graph_output() else [node for node, _ in value.uses()]


def numbers(value: ir.Value | None) -> list[Any] | None:
    """The elements of a small constant, None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size > SMALL or (value is not None and value.is_graph_input()):
        return None
    return np.ravel(tensor.numpy()).tolist()


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, a list for several."""
    if name not in node.attributes:
        return default
    value = node.attributes[name].value
    return list(value) if isinstance(value, tuple) else value


def sizes(value: ir.Value | None) -> list[Size] | None:
    """The shape, None where even the rank is unknown."""
    return None if value is None or value.shape is None else list(value.shape)


def same_size(a: Size, b: Size) -> bool:
    """Surely equal."""
    return isinstance(a, int) == isinstance(b, int) and a == b and (isinstance(a, int) or a.value is not None)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Surely equal, in every size."""
    mine, theirs = sizes(a), sizes(b)
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    return all(map(same_size, mine, theirs))


def is_last(axis: int, value: ir.Value) -> bool:
    """Whether ``axis`` is the last one of ``value``."""
    rank = sizes(value)
    return axis == -1 or (rank is not None and axis == len(rank) - 1)


def is_heads_first(node: ir.Node | None) -> bool:
    """A Transpose between ``[B, T, H, D]`` and ``[B, H, T, D]``."""
    return (
        node is not None
        and (node.domain, node.op_type) == ("", "Transpose")
        and attribute(node, "perm", None) == HEADS_FIRST
    )


def part(value: ir.Value | None) -> Part | None:
    """The channels that a Slice or an output of Split takes of the last axis, whose size is a number."""
    node = value.producer() if value is not None else None
    source = node.inputs[0] if node is not None and node.inputs else None
    shape = sizes(source)
    if node is None or source is None or not shape or not isinstance(shape[-1], int) or node.domain:
        return None
    if node.op_type == "Slice":
        starts, stops = numbers(node.inputs[1]), numbers(node.inputs[2])
        axes = numbers(node.inputs[3]) if len(node.inputs) > 3 else None
        steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else [1]
        if not (starts and stops and axes and steps) or len(axes) != 1 or steps[0] < 1 or not is_last(axes[0], source):
            return None
        start, stop, _ = slice(starts[0], stops[0]).indices(shape[-1])
        return Part(source, start, stop, steps[0])
    if node.op_type == "Split" and is_last(attribute(node, "axis", 0), source):
        widths = [(sizes(output) or [0])[-1] for output in node.outputs]
        ends = [0, *itertools.accumulate(width if isinstance(width, int) else 0 for width in widths)]
        if ends[-1] != shape[-1]:
            return None
        index = list(node.outputs).index(value)  # type: ignore[arg-type]
        return Part(source, ends[index], ends[index + 1], 1)
    return None


def constant(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """An int64 initializer, one for equal values."""
    name = "_".join(["pe_onnx_int64", *map(str, values)])
    return graph.initializers.get(name) or initializer(graph, name, np.array(values, np.int64))


def initializer(graph: ir.Graph, name: str, values: np.ndarray[Any, Any]) -> ir.Value:
    """A new one of the array's dtype and shape."""
    tensor = ir.tensor(np.ascontiguousarray(values), name=name)
    shape, kind = ir.Shape(values.shape), ir.TensorType(tensor.dtype)
    graph.initializers[name] = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    return graph.initializers[name]


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    shape: Sequence[Size],
    attributes: dict[str, Any] | None = None,
    domain: str = "",
) -> ir.Value:
    """The output of a new node before another one; its type is that of the first input."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    output, first = node.outputs[0], inputs[0]
    assert first is not None
    output.shape, output.type = ir.Shape(shape), first.type
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let all who read ``old`` read ``new``, which takes its scoped name, and drop what nobody reads any more."""
    take_name(new, old)
    ir.convenience.replace_all_uses_with(old, new)
    drop(old)


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Let all who read ``old``, the graph's outputs included, read ``new``, which takes its shape, type and name."""
    new.shape, new.type, name = old.shape, old.type, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name


def take_name(new: ir.Value, old: ir.Value) -> None:
    """Give a value that has no scoped name, and its node, that of the value in whose place it stands."""
    node = new.producer()
    if "/" in (old.name or "") and "/" not in (new.name or "") and node is not None:
        old.name, new.name = new.name, old.name
        node.name = new.name


def drop(value: ir.Value | None) -> None:
    """Remove the node that makes ``value``, and what it alone reads, if nobody reads it."""
    node = value.producer() if value is not None else None
    if node is None or node.graph is None or any(x.uses() or x.is_graph_output() for x in node.outputs):
        return
    inputs = list(node.inputs)
    node.graph.remove(node, safe=True)
    for value in inputs:
        drop(value)
