"""Attention that rotates its own queries and keys, out of the product that makes all three.

GroupQueryAttention of onnxruntime takes queries, keys and values side by side, as the joined projection gives them, and
tables of cosines and sines: a Split and two RotaryEmbedding a layer go, and what they read and wrote with them::

    (q, k, v) = Split(x);  CachedAttention(R(q), R(k), v)  ->  GroupQueryAttention(x, cos, sin, do_rotary = 1)

The angles stay those that the graph computes, in float32. Cosines and sines of the tokens of this run are put at their
positions in tables of ``total_length`` rows, of which nobody reads the others. Positions must be those of the slots, as
our runtime has them: onnxruntime leaves unrotated what lies beyond the cache.

In half precision attention takes its tables rounded to it, as transformers rotates, where RotaryEmbedding itself
computes in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir

from pe_onnx.passes.grouped_attention import PE_ONNX, cached_attentions, finish, inputs_of, joined, regroup
from pe_onnx.passes.nodes import attribute, constant, drop, insert, readers

Tables = tuple[ir.Value, ir.Value, ir.Value]
"""Cosines and sines ``[total_length, D / 2]``, and each token's row ``[B, T]``."""


class RotatingAttention(ir.passes.InPlacePass):
    """In the layers whose queries and keys are rotated in all channels and come of one product.

    ``rotated``: how many those were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rotated = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables: dict[tuple[ir.Value, ir.Value], Tables] = {}
        for node in cached_attentions(model.graph):
            self.rotated += _rotate(model.graph, node, tables)
        if self.rotated:
            finish(model)
        return ir.passes.PassResult(model, modified=bool(self.rotated))


def _rotate(graph: ir.Graph, node: ir.Node, tables: dict[tuple[ir.Value, ir.Value], Tables]) -> bool:
    """Replace one layer's attention where its inputs allow it."""
    given = inputs_of(node)
    rotations = [_rotation(x) for x in given[:2]]
    query, key = (rotation.node if rotation else None for rotation in rotations)
    H, K, D = attribute(node, "num_heads", 0), attribute(node, "kv_heads", 0), _last(given[3])
    if query is None or key is None or D is None:
        return False
    parts = [*(rotation and rotation.source for rotation in rotations), given[2]]
    whole, interleaved = joined(parts, [H * D, K * D, K * D]), attribute(query, "interleaved", 0)
    if whole is None:
        return False
    for made, heads in zip(rotations, (H, K), strict=True):
        assert made is not None
        rotation = made.node
        if (
            (rotation.domain, rotation.op_type) != (PE_ONNX, "RotaryEmbedding")
            or rotation.inputs[1:3] != query.inputs[1:3]
            or attribute(rotation, "interleaved", 0) != interleaved
            or attribute(rotation, "num_heads", 0) != heads
            or attribute(rotation, "rotary_dim", 0) != D
        ):
            return False
    alone = all(len(readers(x)) == 1 for x in (*parts, query.outputs[0], key.outputs[0], *given[:2]) if x is not None)
    if not alone or given[6] is None:
        return False

    cos, sin = query.inputs[1:3]
    assert cos is not None
    assert sin is not None
    if (cos, sin) not in tables:
        assert whole.dtype is not None
        tables[cos, sin] = _tables(graph, node, (cos, sin), given[6], D // 2, whole.dtype)
    inputs = [whole, None, None, *given[3:7], *tables[cos, sin], *given[7:]]
    regroup(graph, node, inputs, {"do_rotary": 1, "rotary_interleaved": interleaved})
    for rotated in given[:2]:
        drop(rotated)
    return True


class _Rotation(NamedTuple):
    """What makes queries or keys, and of what."""

    node: ir.Node
    source: ir.Value | None


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """Half precision goes to float32 before a rotation, and back behind it."""
    node = value.producer() if value is not None else None
    if value is None or node is None or value.dtype == ir.DataType.FLOAT or node.op_type != "Cast" or node.domain:
        return None if node is None else _Rotation(node, node.inputs[0] if node.inputs else None)
    rotation = node.inputs[0].producer() if node.inputs[0] is not None else None
    before = rotation.inputs[0].producer() if rotation is not None and rotation.inputs[0] is not None else None
    if rotation is None or before is None or before.op_type != "Cast" or before.domain:
        return None
    source = before.inputs[0]
    return _Rotation(rotation, source if source is not None and source.dtype == value.dtype else None)


def _last(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _tables(
    graph: ir.Graph,
    node: ir.Node,
    rotation: tuple[ir.Value, ir.Value],
    length: ir.Value,
    half: int,
    dtype: ir.DataType,
) -> Tables:
    """Before ``node``. rotation: cos and sin ``[B or 1, T, half]``; length: slots in use, int32 ``[1]``."""
    (positions,) = (value for value in graph.inputs if value.name == "position_ids")
    integers, floats = ir.TensorType(ir.DataType.INT64), ir.TensorType(dtype)

    def add(op_type: str, inputs: list[ir.Value], rank: int, kind: ir.TypeProtocol | None, **attributes: Any) -> Any:
        made = insert(node, op_type, inputs, [ir.SymbolicDim(None)] * rank, attributes)
        made.type = kind
        return made

    width = constant(graph, [half])
    size = add("Concat", [add("Cast", [length], 1, integers, to=7), width], 1, integers, axis=0)
    empty = add("ConstantOfShape", [size], 2, floats, value=ir.tensor([0.0], dtype))
    rows = add("Unsqueeze", [positions, constant(graph, [2])], 3, integers)
    shape = add("Concat", [add("Shape", [positions], 1, integers), width], 1, integers, axis=0)
    narrow = [x if x.dtype == dtype else add("Cast", [x], 3, floats, to=int(dtype)) for x in rotation]
    cos, sin = (add("ScatterND", [empty, rows, add("Expand", [x, shape], 3, floats)], 2, floats) for x in narrow)
    return cos, sin, positions
