"""Products with weights in blocks as products with floats, which a runtime makes of the same bytes when it loads them.

For a runtime that has no kernel for MatMulNBits: onnxruntime-web unpacks all weights at every product. The file keeps
its few bits; for bits b, N rows and blocks of k of the weight ``[N, K]``::

    weight = (float(packed [N, K/k, k]) - zero_point [N, K/k, 1]) * scale [N, K/k, 1]
    MatMulNBits(x) = x @ weight.reshape(N, K).T + bias

All of it but the product is constant, so it is computed once. Activations stay in floats, whatever ``accuracy_level``
says.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pe_onnx.passes.nodes import attribute, constant, insert, sizes

MICROSOFT = "com.microsoft"
INTEGERS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


class UnpackedProducts(ir.passes.InPlacePass):
    """Every MatMulNBits of 4 or 8 bits. ``unpacked_bytes`` is what the floats will take in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.unpacked_bytes = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits") and attribute(node, "bits", 4) in INTEGERS:
                self._unpack(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _unpack(self, graph: ir.Graph, node: ir.Node) -> None:
        x, packed, scales, zero_points, _, bias = [*node.inputs, None, None, None][:6]
        assert packed is not None
        assert scales is not None
        assert scales.dtype is not None
        bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 32)
        N, K = attribute(node, "N", 0), attribute(node, "K", 0)
        self.unpacked_bytes += N * K * int(scales.dtype.itemsize)
        blocks = [N, K // block]
        to = {"to": ir.AttrInt64("to", scales.dtype)}
        last, whole = constant(graph, [-1]), constant(graph, [N, K])
        numbers = insert(node, "Cast", [_as_integers(graph, packed, bits, [*blocks, block])], [*blocks, block], to)
        numbers.type = scales.type
        if zero_points is None:
            zero = _number(graph, 2 ** (bits - 1), scales.dtype)
        else:
            row = -(-blocks[1] * bits // 8) * 8 // bits
            stored = _as_integers(graph, zero_points, bits, [N, row])
            every = insert(node, "Cast", [stored], [N, row], to)
            every.type = scales.type
            kept = insert(node, "Slice", [every, *(constant(graph, [n]) for n in (0, blocks[1], 1))], blocks)
            zero = insert(node, "Unsqueeze", [kept, last], [*blocks, 1])
        centred = insert(node, "Sub", [numbers, zero], [*blocks, block])
        scale = insert(node, "Unsqueeze", [scales, last], [*blocks, 1])
        scaled = insert(node, "Mul", [centred, scale], [*blocks, block])
        rows = insert(node, "Reshape", [scaled, whole], [N, K])
        weight = insert(node, "Transpose", [rows], [K, N], {"perm": ir.AttrInt64s("perm", [1, 0])})
        old = node.outputs[0]
        shape = sizes(old) or []
        result = insert(node, "MatMul", [x, weight], shape)
        if bias is not None:
            result = insert(node, "Add", [result, bias], shape)
        name = old.name
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        old.name, result.name = None, name
        graph.remove(node, safe=True)


def _as_integers(graph: ir.Graph, value: ir.Value, bits: int, shape: list[int]) -> ir.Value:
    """The bytes of an initializer as numbers of so many bits, the lower half of a byte first."""
    name = f"{value.name}/integers"
    if name not in graph.initializers:
        dtype, tensor = INTEGERS[bits], value.const_value
        made: ir.TensorProtocol
        if isinstance(tensor, ir.ExternalTensor):
            made = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                dtype,
                shape=ir.Shape(shape),
                name=name,
                base_dir=tensor.base_dir,
            )
        elif bits == 8:
            assert tensor is not None
            made = ir.tensor(tensor.numpy().reshape(shape), name=name)
        else:
            assert tensor is not None
            data = np.ascontiguousarray(tensor.numpy()).reshape(-1)
            made = ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=name)
        new = ir.Value(name=name, const_value=made, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        graph.initializers[name] = new
    return graph.initializers[name]


def _number(graph: ir.Graph, value: int, dtype: ir.DataType) -> ir.Value:
    name = f"pe_onnx_zero_point_{value}_{dtype.name}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(value, dtype.numpy()), name=name)
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(()), type=ir.TensorType(dtype))
        graph.initializers[name] = made
    return graph.initializers[name]
