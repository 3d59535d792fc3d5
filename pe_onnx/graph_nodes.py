"""The nodes of an ONNX file by name, read off the file itself: the runtime half has no onnx package.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3), which never change.
Weights are stepped over, never copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pe_onnx.errors import BundleError

MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_GRAPH, VALUE_NAME = 6, 1
TENSOR_SIZES, TENSOR_KIND, TENSOR_NAME = 1, 2, 8
FUNCTION_NAME, FUNCTION_INPUT, FUNCTION_DOMAIN = 1, 4, 10
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOATING = (1, 10, 11, 16)
"""TensorProto's float32, float16, float64 and bfloat16."""


class Node(NamedTuple):
    """A node of the main graph; the values that its subgraphs read from outside count among its inputs."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class GraphNodes(NamedTuple):
    """A model's main graph."""

    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    initializers: dict[str, bool]
    """Name to whether it is a table: floating-point numbers, more than one."""
    functions: dict[str, list[str]]
    """Name of each model-local function to its inputs' names."""


def read_graph(path: Path) -> GraphNodes:
    """Raises BundleError for a file that is no ONNX model."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graph, functions = None, {}
            for field, begin, end in _fields(data, 0, len(data)):
                if field == MODEL_GRAPH:
                    graph = _graph(data, begin, end)
                elif field == MODEL_FUNCTIONS:
                    parts = list(_fields(data, begin, end))
                    name = next(_text(data, b, e) for f, b, e in parts if f == FUNCTION_NAME)
                    functions[name] = [_text(data, b, e) for f, b, e in parts if f == FUNCTION_INPUT]
            if graph is None:
                raise ValueError("no graph")
    except (OSError, ValueError, IndexError, StopIteration) as error:
        raise BundleError(f"{path} cannot be read as an ONNX model: {error}") from error
    return graph._replace(functions=functions)


def _graph(data: mmap.mmap, begin: int, end: int) -> GraphNodes:
    found = GraphNodes([], [], [], {}, {})
    for field, b, e in _fields(data, begin, end):
        if field == GRAPH_NODE:
            found.nodes.append(_node(data, b, e))
        elif field == GRAPH_INITIALIZER:
            name, table = _tensor(data, b, e)
            found.initializers[name] = table
        elif field == GRAPH_INPUT:
            found.inputs.append(_named(data, b, e, VALUE_NAME))
        elif field == GRAPH_OUTPUT:
            found.outputs.append(_named(data, b, e, VALUE_NAME))
    return found


def _node(data: mmap.mmap, begin: int, end: int) -> Node:
    inputs, outputs, texts = [], [], {NODE_NAME: "", NODE_OPERATOR: "", NODE_DOMAIN: ""}
    for field, b, e in _fields(data, begin, end):
        if field == NODE_INPUT:
            inputs.append(_text(data, b, e))
        elif field == NODE_OUTPUT:
            outputs.append(_text(data, b, e))
        elif field in texts:
            texts[field] = _text(data, b, e)
        elif field == NODE_ATTRIBUTE:
            for kind, first, last in _fields(data, b, e):
                if kind == ATTRIBUTE_GRAPH:
                    inputs += _read_from_outside(_graph(data, first, last))
    return Node(texts[NODE_NAME], texts[NODE_OPERATOR], texts[NODE_DOMAIN], tuple(inputs), tuple(outputs))


def _tensor(data: mmap.mmap, begin: int, end: int) -> tuple[str, bool]:
    name, elements, kind = "", 1, 0
    for field, b, e in _fields(data, begin, end):
        if field == TENSOR_NAME:
            name = _text(data, b, e)
        elif field == TENSOR_KIND:
            kind = _varint(data, b)[0]
        elif field == TENSOR_SIZES:  # one field for all sizes, or one for each
            while b < e:
                size, b = _varint(data, b)
                elements *= size
    return name, kind in FLOATING and elements > 1


def _read_from_outside(graph: GraphNodes) -> list[str]:
    own = {*graph.inputs, *graph.initializers, *(name for node in graph.nodes for name in node.outputs)}
    read = [*graph.outputs, *(name for node in graph.nodes for name in node.inputs)]
    return [name for name in read if name not in own]


def _named(data: mmap.mmap, begin: int, end: int, number: int) -> str:
    return next((_text(data, b, e) for field, b, e in _fields(data, begin, end) if field == number), "")


def _text(data: mmap.mmap, begin: int, end: int) -> str:
    return data[begin:end].decode("utf-8")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field; of those that are not bytes begin and end are the value's own."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == BYTES:
            size, at = _varint(data, at)
            last = at + size
        elif kind == VARINT:
            last = _varint(data, at)[1]
        elif kind in (FIXED32, FIXED64):
            last = at + (4 if kind == FIXED32 else 8)
        else:
            raise ValueError(f"wire type {kind}")
        if last > end:
            raise ValueError("truncated")
        yield tag >> 3, at, last
        at = last


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
