"""Which operator it is that makes a value differ: the one behind it, or one that PyTorch does not have before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_onnx.divergence import Difference, Divergence, InputStatistics, difference, statistics
from pe_onnx.errors import needs
from pe_onnx.passes.fused_projections import is_joined
from pe_onnx.passes.scoped_names import scope_of

if TYPE_CHECKING:
    from pe_onnx.exposed import ExposedGraph
    from pe_onnx.replay import Run
    from pe_onnx.twin import Twin

with needs("looking into a graph", "'pe-onnx[export]'"):
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

CHAIN = 32
"""Operators without a counterpart that are looked through."""


@dataclass
class _Input:
    """A tensor of the operator, and the one that PyTorch hands in in its place."""

    index: int
    value: ir.Value
    counterpart: str | None
    chain: list[ir.Node] = field(default_factory=list)
    """The nodes that it was made by, from the last on, where it has no counterpart of its own name."""

    @property
    def name(self) -> str:
        return self.value.name or ""


class Blame:
    """Of one value that differs."""

    def __init__(self, graph: ExposedGraph, twin: Twin, limit: float, value: str, matched: set[str]) -> None:
        """limit: of the relative difference of values that agree. matched: names that mean the same on both sides."""
        self.graph, self.twin, self.limit, self.value, self.matched = graph, twin, limit, value, matched
        node = graph.values[value].producer()
        if node is not None and is_joined(node):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert node is not None
        self.node = node
        self.inputs = self._inputs()

    @property
    def exposed(self) -> list[str]:
        """What is to be seen of the bundle's side."""
        made = [v for x in self.inputs for n in x.chain for v in (*n.inputs, *n.outputs) if v is not None]
        values = [self.graph.values[self.value], *(x.value for x in self.inputs), *made]
        return list(dict.fromkeys(v.name or "" for v in values if v.producer() is not None))

    @property
    def made(self) -> list[str]:
        """The outputs of the operator behind the value."""
        return [v.name or "" for v in self.node.outputs]

    @property
    def counterparts(self) -> list[str]:
        """What is to be seen of PyTorch's side."""
        return [self.value, *(x.counterpart for x in self.inputs if x.counterpart is not None)]

    def divergence(self, run: Run, **where: Any) -> Divergence:
        """run: one with ``exposed`` and ``counterparts``. where: the further fields."""
        inputs = [self._statistics(x, run) for x in self.inputs]
        own = [s.difference for x, s in zip(self.inputs, inputs, strict=True) if s.difference and not self._bad(s)]
        before = max(own, key=lambda d: d.relative, default=Difference(0.0, 0.0))
        node, remark = self.node, self._attributes()
        for x, s in zip(self.inputs, inputs, strict=True):
            if self._bad(s):
                inserted = self._inserted(x, run)
                node = inserted or node
                remark = self._remark(x, s, inserted)
                break
        found = run.difference(self.value)
        return Divergence(
            layer=scope_of(self.value) or scope_of(self.node.name or ""),
            operator=node.op_type,
            node=node.name or "",
            reader=self.node.op_type,
            value=self.value,
            difference=found or Difference(float("inf"), float("inf")),
            before=before,
            inputs=inputs,
            remark=remark,
            **where,
        )

    def _bad(self, s: InputStatistics) -> bool:
        return s.difference is not None and not s.difference.relative <= self.limit

    def _inputs(self) -> list[_Input]:
        """Inputs with a name that PyTorch knows are their own counterparts; the others stand in the same place."""
        given = self.twin.tensors(self.value)
        known = {*self.matched, *self.twin.weights, *self.twin.inputs}
        inputs = [
            _Input(i, v, v.name if v.name in known else None) for i, v in enumerate(self.node.inputs) if v is not None
        ]
        left = [name for name in given if name is not None and name not in {x.counterpart for x in inputs}]
        unknown = [x for x in inputs if x.counterpart is None and not _is_constant(x.value)]
        for x in unknown:
            there = given[x.index] if x.index < len(given) else None
            if there in left:
                x.counterpart = there
            elif len(left) == len(unknown) == 1:
                x.counterpart = left[0]
            x.chain = self._chain(x.value, known)
        return inputs

    def _chain(self, value: ir.Value, known: set[str]) -> list[ir.Node]:
        chain: list[ir.Node] = []
        while len(chain) < CHAIN and value.name not in known and (node := value.producer()) is not None:
            chain.append(node)
            above = [v for v in node.inputs if v is not None and v.producer() is not None]
            if not above:
                break
            value = above[0]
        return chain

    def _statistics(self, x: _Input, run: Run) -> InputStatistics:
        weight = self.graph.initializer(x.name)
        held = run.bundle.get(x.name, run.given[0].get(x.name))
        value = weight if weight is not None else held
        assert value is not None
        s = statistics(x.name, value)
        s.made_by = [n.op_type for n in x.chain] + ([_top(x.chain)] if x.chain else [])
        if weight is not None:
            s.difference, s.remark = _of_weight(self.twin.weight(x.name), weight)
        elif x.counterpart in run.twin:
            s.difference = run.difference(x.name, x.counterpart)
        elif x.counterpart in run.given[1]:
            s.difference = difference(run.given[1][x.counterpart], value)
        return s

    def _inserted(self, x: _Input, run: Run) -> ir.Node | None:
        """The operator that takes PyTorch's value, or one equal to it, and hands on another."""
        for node in x.chain:
            for v in node.inputs:
                if v is None or v.producer() is None:
                    continue
                equal = run.difference(v.name or "", x.counterpart)
                if v.name == x.counterpart or (equal is not None and equal.relative <= self.limit):
                    return node
        return None

    def _remark(self, x: _Input, s: InputStatistics, inserted: ir.Node | None) -> str:
        off = f"max abs {s.difference.max_abs:.2g}" if s.difference else ""
        if inserted is not None:
            at = f"input {x.index} of {self.node.op_type}"
            return f"{_described(inserted)} stands before {at}, where PyTorch hands in {x.counterpart} ({off})"
        if self.graph.initializer(x.name) is not None:
            return f"its weight {x.name} is not PyTorch's, {off}{s.remark and ', ' + s.remark}"
        made = " <- ".join(s.made_by)
        return f"its input {x.index}, {x.name}{made and ', made by ' + made}, is not PyTorch's {x.counterpart}, {off}"

    def _attributes(self) -> str:
        """Numbers that PyTorch's operation was called with otherwise."""
        wanted = self.twin.numbers(self.value)
        for name, attribute in self.node.attributes.items():
            have, want = attribute.value, wanted.get(name)
            if want is not None and isinstance(have, int | float) and not np.isclose(have, want, rtol=1e-6):
                return f"its attribute {name} = {have:g} is {want:g} in PyTorch"
        return ""


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() or (value.producer() is None and not value.is_graph_input())


def _top(chain: list[ir.Node]) -> str:
    """The name of what a chain begins with."""
    return next((v.name or "" for v in chain[-1].inputs if v is not None), "")


def _described(node: ir.Node) -> str:
    to = node.attributes.get_int("to") if node.op_type == "Cast" else None
    return node.op_type + (f" to {ir.DataType(to).name.lower()}" if to is not None else "")


def _of_weight(want: Any, have: Array) -> tuple[Difference | None, str]:
    """Weights may be turned in the file."""
    if want is None:
        return None, ""
    held = want.float().numpy() if want.is_floating_point() else want.numpy()
    turned = [w for w in (held, held.T) if w.shape == have.shape]
    if not turned:
        return None, ""
    found = min((d for w in turned if (d := difference(w, have)) is not None), key=lambda d: d.relative)
    same = found.max_abs > 0 and np.array_equal(np.sort(held, None), np.sort(have, None))
    return found, "the same numbers in another order" if same else ""
