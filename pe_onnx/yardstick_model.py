"""The yardstick's ONNX model, written byte by byte: the runtime half has no onnx package.

``y = x w0 w1 ...``: float32 ``x [tokens, width]``, weights ``[width, width]`` that are constants, so that onnxruntime
packs them and takes the kernel that it takes for a bundle's. They stand in the model as external tensors, without a
file: whoever loads it hands them in. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

MODEL_IR_VERSION, MODEL_PRODUCER, MODEL_GRAPH, MODEL_OPSET = 1, 2, 7, 8
OPSET_DOMAIN, OPSET_VERSION = 1, 2
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 2, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_OPERATOR = 1, 2, 4
TENSOR_SIZE, TENSOR_KIND, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_TYPE_KIND, TENSOR_TYPE_SHAPE = 1, 2, 1, 1, 2
SHAPE_DIMENSION, DIMENSION_SIZE, DIMENSION_SYMBOL = 1, 1, 2
FLOAT, EXTERNAL = 1, 1
IR_VERSION, OPSET = 8, 17


def weight_names(products: int) -> list[str]:
    return [f"w{i}" for i in range(products)]


def product_chain(products: int, width: int) -> bytes:
    """The serialised model of ``products`` matrix products one after the other."""
    values = ["x", *(f"x{i}" for i in range(1, products)), "y"]
    graph = b"".join(
        _bytes(GRAPH_NODE, _node(values[i], name, values[i + 1])) for i, name in enumerate(weight_names(products))
    )
    graph += _text(GRAPH_NAME, "yardstick")
    graph += b"".join(_bytes(GRAPH_INITIALIZER, _weight(name, width)) for name in weight_names(products))
    graph += _bytes(GRAPH_INPUT, _value("x", width)) + _bytes(GRAPH_OUTPUT, _value("y", width))
    return (
        _number(MODEL_IR_VERSION, IR_VERSION)
        + _text(MODEL_PRODUCER, "pe-onnx")
        + _bytes(MODEL_GRAPH, graph)
        + _bytes(MODEL_OPSET, _text(OPSET_DOMAIN, "") + _number(OPSET_VERSION, OPSET))
    )


def _node(x: str, w: str, y: str) -> bytes:
    return _text(NODE_INPUT, x) + _text(NODE_INPUT, w) + _text(NODE_OUTPUT, y) + _text(NODE_OPERATOR, "MatMul")


def _weight(name: str, width: int) -> bytes:
    place = _text(ENTRY_KEY, "location") + _text(ENTRY_VALUE, "handed in")
    sizes = _number(TENSOR_SIZE, width) + _number(TENSOR_SIZE, width)
    return (
        sizes
        + _number(TENSOR_KIND, FLOAT)
        + _text(TENSOR_NAME, name)
        + _bytes(TENSOR_EXTERNAL, place)
        + _number(TENSOR_LOCATION, EXTERNAL)
    )


def _value(name: str, width: int) -> bytes:
    tokens, columns = _text(DIMENSION_SYMBOL, "tokens"), _number(DIMENSION_SIZE, width)
    shape = _bytes(SHAPE_DIMENSION, tokens) + _bytes(SHAPE_DIMENSION, columns)
    tensor = _number(TENSOR_TYPE_KIND, FLOAT) + _bytes(TENSOR_TYPE_SHAPE, shape)
    return _text(VALUE_NAME, name) + _bytes(VALUE_TYPE, _bytes(TYPE_TENSOR, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])
