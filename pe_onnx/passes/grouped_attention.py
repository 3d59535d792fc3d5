"""CachedAttention as the operator of onnxruntime that it stands for, for passes that give that one more to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from pe_onnx.passes.nodes import attribute, is_last, numbers, take_place

PE_ONNX, MICROSOFT = "pe_onnx", "com.microsoft"
INPUTS = 9
"""Query, key, value, past key and value, last slots, total length, bias, sinks."""
RENAMED = {"kv_heads": "kv_num_heads", "window": "local_window_size"}


def cached_attentions(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if (node.domain, node.op_type) == (PE_ONNX, "CachedAttention")]


def inputs_of(node: ir.Node) -> list[ir.Value | None]:
    """All of INPUTS, None for those that are left out."""
    return [*node.inputs, *[None] * (INPUTS - len(node.inputs))]


def joined(parts: Sequence[ir.Value | None], widths: Sequence[int]) -> ir.Value | None:
    """The value of whose last axis a Split makes just these parts, of these widths; None where none is."""
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or (split.domain, split.op_type) != ("", "Split") or list(split.outputs) != list(parts):
        return None
    whole, *others = split.inputs
    even = not others and len(set(widths)) == 1
    if whole is None or not (even or (others and numbers(others[0]) == list(widths))):
        return None
    return whole if is_last(attribute(split, "axis", 0), whole) else None


def regroup(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], more: dict[str, Any]) -> ir.Node:
    """Put GroupQueryAttention in the place of a CachedAttention, whose attributes it keeps beside ``more``; the new
    node."""
    attributes = {RENAMED.get(name, name): attribute(node, name, None) for name in node.attributes} | more
    new = ir.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, num_outputs=3, name=node.name)
    graph.insert_before(node, new)
    for made, old in zip(new.outputs, node.outputs, strict=True):
        take_place(made, old)
    graph.remove(node, safe=True)
    return new


def finish(model: ir.Model) -> None:
    """To be called once, behind ``regroup``: functions that nobody calls go."""
    common.RemoveUnusedFunctionsPass()(model)
    model.opset_imports[MICROSOFT] = 1
