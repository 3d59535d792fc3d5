"""A traced program brought to the operators that ONNX has, without tracing it anew.

PyTorch's exporter decomposes a program by running all of it through the tracer once more, a third of an export. What a
decoder's program holds beyond operators that ONNX has are casts, written in three ways, logical operators under their
Python names, and assertions: each of them is one node for one node. A program that holds anything else is left to
PyTorch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Node

aten: Any = torch.ops.aten

ALIKE: dict[Any, Any] = {aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__and__.Tensor: aten.bitwise_and.Tensor}
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
CHECKS = (aten._assert_tensor_metadata.default,)
SAME = (aten.detach_.default, aten.detach.default)
"""Their output is their input, in a program that writes to no tensor."""

NAMESPACES = ("aten", "pe_onnx")


def decompose_in_place(program: torch.export.ExportedProgram) -> None:
    """Let ``program.run_decompositions`` change the program itself where one node for one node is enough."""
    of_torch = program.run_decompositions

    def run_decompositions(
        decomp_table: Mapping[Any, Any] | None = None, **options: Any
    ) -> torch.export.ExportedProgram:
        if decomp_table is None or not all(_is_simple(node, decomp_table) for node in program.graph.nodes):
            return of_torch(decomp_table, **options)
        _rewrite(program)
        return program

    program.run_decompositions = run_decompositions


def _is_simple(node: Node, decomposed: Collection[Any]) -> bool:
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if target in ALIKE or target in CASTS or target in CHECKS or target in SAME:
        return True
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
