"""ALiBi without a bias, in channels of the heads (``pe_onnx/position_channels.py``): for CUDA, whose fused attention
takes no bias, while that with one writes all scores to memory.

Queries, keys and values go to attention side by side, as the joined projection gives them, each head with CHANNELS
more. Those are the same in all layers and made once a run, from the positions of the new tokens::

    (q, k, v) = Split(x);  CachedAttention(q, k, v, AlibiBias(slopes, positions, 0 .. S - 1))
    ->  GroupQueryAttention(Concat(x, channels)), of whose heads the own channels are read

The caches have those channels too: past and present are wider than in the bundle's other graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from pe_onnx.passes.grouped_attention import PE_ONNX, cached_attentions, finish, inputs_of, joined, regroup
from pe_onnx.passes.nodes import Size, attribute, constant, drop, initializer, insert, made_by, numbers
from pe_onnx.position_channels import BITS, CHANNELS, SHIFT, USED, Array, of_queries

GREATEST_HEAD = 256
"""Channels of a head that onnxruntime's fused attention takes on CUDA."""
DTYPES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
UNKNOWN = ir.SymbolicDim(None)


class _Layer(NamedTuple):
    """Attention whose bias can go."""

    node: ir.Node
    positions: ir.Value
    """Of the new tokens, int64 ``[B, T]``."""
    queries: Array
    """Their channels, float64 ``[H, CHANNELS]``."""
    heads: tuple[int, int]
    """H and K."""
    size: int
    dtype: ir.DataType


class AlibiChannels(ir.passes.InPlacePass):
    """In all layers of a graph in half precision, or in none where one has another bias than ALiBi or none, sinks or a
    soft-cap (both see more than differences of scores), or slopes that half precision does not hold.

    ``bits``: of a position's digit; None where nothing was replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bits: int | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [_layer(node) for node in cached_attentions(graph)]
        layers = [layer for layer in found if layer is not None]
        others = any(node.op_type == "GroupQueryAttention" for node in graph)  # of layers that rotate, say
        if not layers or len(layers) < len(found) or others:
            return ir.passes.PassResult(model, False)
        made: dict[tuple[ir.Value, bytes, tuple[int, int]], ir.Value] = {}
        for layer in layers:
            key = layer.positions, layer.queries.tobytes(), layer.heads
            if key not in made:
                made[key] = _channels(graph, layer, len(made))
            _widen(graph, layer, made[key])
        self.bits = BITS[DTYPES[layers[0].dtype]]
        finish(model)
        return ir.passes.PassResult(model, True)


def _layer(node: ir.Node) -> _Layer | None:
    given, scale = inputs_of(node), attribute(node, "scale", 0.0)
    past, bias, sinks = given[3], given[7], given[8]
    cast = made_by(bias, "Cast")
    alibi = made_by(cast.inputs[0] if cast is not None else bias, "AlibiBias", PE_ONNX)
    size = past.shape[3] if past is not None and past.shape is not None else None
    if alibi is None or past is None or past.dtype not in DTYPES or not isinstance(size, int):
        return None
    slopes, positions, keys = alibi.inputs[:3]
    tensor = ir.convenience.get_const_tensor(slopes) if slopes is not None else None
    if tensor is None or positions is None or not _from_zero(keys) or sinks is not None:
        return None
    if attribute(node, "softcap", 0.0) or size + CHANNELS > GREATEST_HEAD:
        return None
    queries = of_queries(tensor.numpy(), scale, DTYPES[past.dtype])
    heads = attribute(node, "num_heads", 0), attribute(node, "kv_heads", 0)
    return None if queries is None else _Layer(node, positions, queries, heads, size, past.dtype)


def _from_zero(keys: ir.Value | None) -> bool:
    """Whether they are 0, 1, 2, ... ``[1, S]``: positions are slots of the cache."""
    row = made_by(keys, "Unsqueeze")
    counted = made_by(row.inputs[0], "Range") if row is not None else None
    return counted is not None and numbers(counted.inputs[0]) == [0] and numbers(counted.inputs[2]) == [1]


def _channels(graph: ir.Graph, layer: _Layer, number: int) -> ir.Value:
    """Before the layer's attention: those of all heads of queries, keys and values, ``[B, T, H + 2 K, CHANNELS]``."""
    (H, K), used = layer.heads, USED[BITS[DTYPES[layer.dtype]]]
    one = [1] * (CHANNELS - len(used))
    lowest, moduli = [c.lowest for c in used] + one, [c.modulus for c in used] + one  # modulo 1 leaves nothing
    of_digits, fixed = np.zeros((2, H + 2 * K, CHANNELS))
    of_digits[H : H + K], fixed[:H] = np.array(lowest) / (1 << SHIFT), layer.queries

    def held(name: str, values: Array) -> ir.Value:
        return initializer(graph, f"pe_onnx/alibi_channels.{number}/{name}", values.astype(layer.dtype.numpy()))

    shape: list[Size] = [UNKNOWN, UNKNOWN, 1, CHANNELS]
    each = insert(layer.node, "Unsqueeze", [layer.positions, constant(graph, [2, 3])], [UNKNOWN, UNKNOWN, 1, 1])
    above = insert(layer.node, "Div", [each, constant(graph, lowest)], shape)
    digits = insert(layer.node, "Mod", [above, constant(graph, moduli)], shape)
    rounded = insert(layer.node, "Cast", [digits], shape, {"to": int(layer.dtype)})
    rounded.type = ir.TensorType(layer.dtype)
    wide: list[Size] = [UNKNOWN, UNKNOWN, H + 2 * K, CHANNELS]
    keys = insert(layer.node, "Mul", [rounded, held("factors", of_digits)], wide)
    return insert(layer.node, "Add", [keys, held("slopes", fixed)], wide)


def _widen(graph: ir.Graph, layer: _Layer, channels: ir.Value) -> None:
    """Replace one layer's attention."""
    node, (H, K), D = layer.node, layer.heads, layer.size
    given = inputs_of(node)
    N, wide = H + 2 * K, D + CHANNELS
    x = joined(given[:3], [H * D, K * D, K * D])
    if x is None:
        x = insert(node, "Concat", given[:3], [UNKNOWN, UNKNOWN, N * D], {"axis": -1})
    heads = insert(node, "Reshape", [x, constant(graph, [0, 0, N, D])], [UNKNOWN, UNKNOWN, N, D])
    whole = insert(node, "Concat", [heads, channels], [UNKNOWN, UNKNOWN, N, wide], {"axis": -1})
    packed = insert(node, "Reshape", [whole, constant(graph, [0, 0, N * wide])], [UNKNOWN, UNKNOWN, N * wide])
    new = regroup(graph, node, [packed, None, None, *given[3:7]], {})
    for value in given[:3] + given[7:8]:
        drop(value)
    for value in (*given[3:5], *new.outputs[1:]):
        if value is not None and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], wide])
    made = new.outputs[0]
    uses, name, shape = tuple(made.uses()), made.name, made.shape
    made.shape = ir.Shape([UNKNOWN, UNKNOWN, H * wide])
    bounds = [constant(graph, [n]) for n in (0, D, 3)]
    before = uses[0].node
    split = insert(before, "Reshape", [made, constant(graph, [0, 0, H, wide])], [UNKNOWN, UNKNOWN, H, wide])
    own = insert(before, "Slice", [split, *bounds], [UNKNOWN, UNKNOWN, H, D])
    result = insert(before, "Reshape", [own, constant(graph, [0, 0, H * D])], [UNKNOWN, UNKNOWN, H * D])
    for use in uses:
        use.node.replace_input_with(use.idx, result)
    made.name, result.name, result.shape = f"{name}/with_channels", name, shape
