"""Which part of a decoder a node belongs to: what the encoding costs, read off the graph.

The encoding's nodes are those that could be left out if the encoding were ``none``:

- its functions (``pe_onnx::RotaryEmbedding``, ``pe_onnx::T5RelativeBias``, ...) and onnxruntime's ``RotaryEmbedding``;
- nodes that bring positions into what depends on the tokens: the sum with a positional vector, the products with
  cos and sin where a rotation is written out;
- nodes of which nothing but these is made: tables of cos and sin, buckets, slopes, gathered rows of a learned table;
- what is made of a bias on its way to the scores, but not the mask that it is put into.

What depends on no token and is not the encoding's makes masks and lengths, which every decoder has. No node's name
counts, only what it reads and what reads it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from pe_onnx.graph_nodes import GraphNodes, Node

ENCODING = "encoding"
ATTENTION = "attention"
PROJECTIONS = "projections"
NORMS = "norms"
MASKS = "masks and lengths"
REST = "rest"
PARTS = (ENCODING, ATTENTION, PROJECTIONS, NORMS, MASKS, REST)

OWN_DOMAIN = "pe_onnx"
ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "DecoderMaskedMultiHeadAttention")
MATRIX_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul")
MERGES = ("Add", "Sub", "Mul")
PIECES = ("Slice", "Split", "Neg", "Concat")
"""What a written-out rotation takes of its input before it is multiplied."""
JOINS = ("Add", "Sub", "Concat")
COUNTING = ("Range", "CumSum")
"""Operators that make positions of a length or a mask."""
TOKENS = ("input_ids", "past_key_values", "encoder_hidden_states")
"""How the names of inputs begin whose values depend on the text."""
INLINED = "_inlfunc_"
"""onnxruntime names a node that it inlined ``_inlfunc_FUNCTION[_token_N]_NODE``, around the name it had before."""


class Attribution:
    """The parts of a graph's nodes, and of the nodes that onnxruntime makes of them."""

    def __init__(self, graph: GraphNodes) -> None:
        self.functions = graph.functions
        self.parts = _parts(graph)
        """Node name to part."""

    def part(self, name: str, operator: str) -> str:
        """Of a node in onnxruntime's optimised graph, by the name and operator it has there.

        A node that a fusion made counts by its operator, and where that says nothing as the node it is named after.
        """
        if name in self.parts:
            return self.parts[name]
        function = self._function(name)
        if function is not None:
            return _of_function(function)
        named_after = max((known for known in self.parts if _begins_with(name, known)), key=len, default=None)
        own = _of_operator(operator)
        return own if own != REST or named_after is None else self.parts[named_after]

    def _function(self, name: str) -> str | None:
        """The outermost of our functions that a node was inlined from: the last one that its name tells of."""
        found = None
        for piece in name.split(INLINED)[1:]:
            inlined = (f for f in self.functions if _begins_with(piece, f))
            found = max(inlined, key=len, default=found)
        return found


def _begins_with(name: str, known: str) -> bool:
    return bool(known) and name.startswith(known) and re.match(r"[^A-Za-z0-9]|$", name[len(known) :]) is not None


def _of_function(function: str) -> str:
    return ATTENTION if function.endswith("Attention") else ENCODING


def _of_operator(operator: str) -> str:
    if operator in ATTENTIONS:
        return ATTENTION
    if operator in MATRIX_PRODUCTS:
        return PROJECTIONS
    if operator == "RotaryEmbedding":
        return ENCODING
    return NORMS if operator.endswith(("Normalization", "LayerNorm")) else REST


def _parts(graph: GraphNodes) -> dict[str, str]:
    moving = {name for name in graph.inputs if name.startswith(TOKENS)}
    """Values that depend on the text."""
    positional = {"position_ids"} & set(graph.inputs)
    tables = {name for name, table in graph.initializers.items() if table}
    encoding: set[int] = set()
    written_out: set[int] = set()
    """Of the encoding's nodes those that are no function."""
    of_encoding: set[str] = set()
    readers: dict[str, list[int]] = defaultdict(list)
    moving_nodes: set[int] = set()
    for i, node in enumerate(graph.nodes):
        for name in node.inputs:
            readers[name].append(i)
        moves = node.operator not in ("Shape", "Size") and not moving.isdisjoint(node.inputs)
        if moves:
            moving.update(node.outputs)
            moving_nodes.add(i)
        else:
            if node.operator in COUNTING or not positional.isdisjoint(node.inputs):
                positional.update(node.outputs)
            if not tables.isdisjoint(node.inputs):
                tables.update(node.outputs)
        own = _kind(node) == ENCODING
        plain = _kind(node) == REST
        still = [name for name in node.inputs if name not in moving]
        text = [name for name in node.inputs if name in moving]
        merges = moves and node.operator in MERGES and bool(text) and not positional.isdisjoint(still)
        joins = moves and node.operator in JOINS and _joins(node, text, of_encoding, graph.nodes, written_out)
        follows = plain and not moves and not of_encoding.isdisjoint(node.inputs)
        if own or merges or joins or follows:
            encoding.add(i)
            of_encoding.update(node.outputs)
            if not own:
                written_out.add(i)
    for i in reversed(range(len(graph.nodes))):
        node = graph.nodes[i]
        if i in encoding or _kind(node) not in (REST, PROJECTIONS):
            continue
        uses = [(j, name) for name in node.outputs for j in readers[name]]
        if not uses or any(name in graph.outputs for name in node.outputs):
            continue
        if i in moving_nodes:
            taken = node.operator in PIECES and all(j in written_out for j, _ in uses)
        else:
            taken = all(
                (j in encoding and not _is_visibility(graph, readers, graph.nodes[j], name))
                or _is_bias(graph, graph.nodes[j], name, tables)
                for j, name in uses
            )
        if taken:
            encoding.add(i)
            written_out.add(i)

    def part(i: int, node: Node) -> str:
        if i in encoding:
            return ENCODING
        kind = _kind(node)
        return MASKS if kind == REST and i not in moving_nodes else kind

    return {node.name: part(i, node) for i, node in enumerate(graph.nodes)}


def _kind(node: Node) -> str:
    return _of_function(node.operator) if node.domain == OWN_DOMAIN else _of_operator(node.operator)


def _joins(node: Node, text: list[str], of_encoding: set[str], nodes: list[Node], written_out: set[int]) -> bool:
    """Whether it puts together what was rotated: the two products, or the rotated channels and the others."""
    if node.operator == "Concat":
        return not of_encoding.isdisjoint(text)
    products = {name for i in written_out for name in nodes[i].outputs if nodes[i].operator == "Mul"}
    return bool(text) and products.issuperset(text)


def _is_visibility(graph: GraphNodes, readers: Mapping[str, list[int]], node: Node, name: str) -> bool:
    """Whether it says which keys may be seen, where a bias is put into the mask: every mask has that."""
    if node.operator != "Where" or node.inputs[0] != name:
        return False
    return any(_is_bias(graph, graph.nodes[j], out, {out}) for out in node.outputs for j in readers[out])


def _is_bias(graph: GraphNodes, reader: Node, name: str, tables: set[str]) -> bool:
    """Whether an attention reads it as a bias; where mask and bias are one input, as one that has parameters."""
    if _kind(reader) != ATTENTION:
        return False
    names = graph.functions.get(reader.operator, [])
    roles = {role for role, value in zip(names, reader.inputs, strict=False) if value == name}
    return roles == {"bias"} or (roles == {"mask"} and name in tables)
