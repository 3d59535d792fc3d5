"""A traced program brought to the operators that ONNX has, without tracing it anew.

PyTorch's exporter decomposes a program by running all of it through the tracer once more, a third of an export. What a
decoder's program holds beyond operators that ONNX has are casts, written in three ways, operators under names of Python
and NumPy, and assertions: each of them is one node for one node. A program that holds anything else is left to PyTorch;
so is one in which the exporter then meets an operator that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.fx import Node
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

aten: Any = torch.ops.aten

T = TypeVar("T")

ALIKE: dict[Any, Any] = {aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__and__.Tensor: aten.bitwise_and.Tensor}
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
CHECKS = (aten._assert_tensor_metadata.default,)
SAME = (aten.detach_.default, aten.detach.default)
"""Their output is their input, in a program that writes to no tensor."""

NAMESPACES = ("aten", "pe_onnx")


def without_tracing(program: torch.export.ExportedProgram, translate: Callable[[], T]) -> T:
    """What ``translate`` gives, which hands the program to the exporter; the program is changed where that is enough.

    translate is called once more, and lets PyTorch decompose the program, where the first call fails.
    """
    of_torch, rewritten = program.run_decompositions, False

    def run_decompositions(
        decomp_table: Mapping[Any, Any] | None = None, **options: Any
    ) -> torch.export.ExportedProgram:
        nonlocal rewritten
        if decomp_table is None or not all(_is_simple(node, decomp_table) for node in program.graph.nodes):
            return of_torch(decomp_table, **options)
        rewritten = True
        _rewrite(program)
        return program

    program.run_decompositions = run_decompositions
    try:
        return translate()
    except Exception:
        if not rewritten:
            raise
    finally:
        program.run_decompositions = of_torch
    return translate()


@contextmanager
def values_as_traced() -> Iterator[None]:
    """Within, the exporter's pass for type promotion looks at the values that tracing left, and computes those of the
    nodes that it changes; otherwise it runs the whole program once more."""
    run_node = _TypePromotionInterpreter.run_node

    def promoted(self: _TypePromotionInterpreter, node: Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return run_node(self, node)
        with self._set_current_node(node):
            if rule := get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    _TypePromotionInterpreter.run_node = promoted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _TypePromotionInterpreter.run_node = run_node  # type: ignore[method-assign]


def _is_simple(node: Node, decomposed: Collection[Any]) -> bool:
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if target in ALIKE or target in CASTS or target in CHECKS or target in SAME:
        return True
    if target == aten.numpy_T.default:
        return node.args[0].meta["val"].dim() == 2  # type: ignore[union-attr]
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.OperatorBase)  # arithmetic of sizes
    return target.namespace in NAMESPACES and target not in decomposed and not target._schema.is_mutable


def _rewrite(program: torch.export.ExportedProgram) -> None:
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target in ALIKE:
            node.target = ALIKE[node.target]
        elif node.target == aten.numpy_T.default:
            node.target = aten.t.default
        elif node.target in SAME or (node.target in CASTS and _dtype(node) == _dtype(node.args[0])):
            _replace(program, node, node.args[0])
        elif node.target in CASTS:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": _dtype(node)}
    program.graph_module.recompile()


def _dtype(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _replace(program: torch.export.ExportedProgram, node: Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    for output in program.graph_signature.output_specs:
        if output.arg.name == node.name:
            output.arg.name = by.name
    program.graph.erase_node(node)
