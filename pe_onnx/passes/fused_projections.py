"""Products of one input with several weights, as queries, keys and values or gate and up are, as one product.

A decode step multiplies one row: what a product costs beside reading its weights is the start of the threads, once for
each product. Joined, the weights are read in one go, and Split hands the parts on under their old names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pe_onnx.passes.nodes import sizes, take_place

JOIN = "&"
"""Between the names of weights that were joined, in the name of the joined one."""


class FusedProjections(ir.passes.InPlacePass):
    """Products ``[..., K] x [K, N1]``, ``[..., K] x [K, N2]``, ... to one with ``[K, N1 + N2 + ...]``.

    Each weight has one reader and a dtype of its own tensor; they are joined while they are written, a tensor at a
    time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: dict[tuple[ir.Value, int, ir.DataType], list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            key = _key(node)
            if key is not None:
                groups[key].append(node)
        joined = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in joined:
            self._join(model.graph, nodes)
        return ir.passes.PassResult(model, bool(joined))

    def _join(self, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
        x, first = nodes[0].inputs[0], nodes[0]
        weights = [node.inputs[1] for node in nodes]
        tensors = [weight.const_value for weight in weights if weight is not None]
        widths = [tensor.shape.numpy()[1] for tensor in tensors if tensor is not None]
        joined = _joined(JOIN.join((weight.name or "") for weight in weights if weight is not None), tensors)
        graph.initializers[joined.name or ""] = joined
        product = ir.node("MatMul", [x, joined])
        lengths = ir.Value(
            name=f"{joined.name}/widths",
            const_value=ir.tensor(np.array(widths, np.int64)),
            shape=ir.Shape((len(widths),)),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.initializers[lengths.name or ""] = lengths
        whole = product.outputs[0]
        whole.type, shape = first.outputs[0].type, sizes(first.outputs[0])
        whole.shape = ir.Shape([*shape[:-1], sum(widths)]) if shape else None
        split = ir.node("Split", [whole, lengths], {"axis": -1}, num_outputs=len(nodes))
        graph.insert_before(first, [product, split])
        whole.name = f"{first.outputs[0].name}{JOIN}{len(nodes) - 1}"
        product.name, split.name = whole.name, f"{whole.name}:Split"
        for node, part in zip(nodes, split.outputs, strict=True):
            take_place(part, node.outputs[0])
            graph.remove(node, safe=True)
        for weight in weights:
            if weight is not None:
                graph.initializers.pop(weight.name or "", None)


def _key(node: ir.Node) -> tuple[ir.Value, int, ir.DataType] | None:
    """Equal for products that can be joined."""
    if (node.domain, node.op_type) != ("", "MatMul") or node.outputs[0].is_graph_output():
        return None
    x, weight = node.inputs[:2]
    tensor = weight.const_value if weight is not None and weight.is_initializer() else None
    if x is None or weight is None or tensor is None or len(tensor.shape) != 2 or len(weight.uses()) != 1:
        return None
    return x, tensor.shape.numpy()[0], tensor.dtype


def _joined(name: str, tensors: Sequence[ir.TensorProtocol | None]) -> ir.Value:
    parts = [tensor for tensor in tensors if tensor is not None]
    rows = parts[0].shape.numpy()[0]
    shape = ir.Shape((rows, sum(tensor.shape.numpy()[1] for tensor in parts)))

    def read() -> ir.TensorProtocol:
        whole = np.concatenate([tensor.numpy() for tensor in parts], 1)
        for tensor in parts:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
        return ir.tensor(whole, name=name)

    tensor = ir.LazyTensor(read, dtype=parts[0].dtype, shape=shape, name=name)
    return ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(parts[0].dtype))


def is_joined(node: ir.Node | None) -> bool:
    """Whether it is the Split behind a joined product."""
    return (
        node is not None and node.op_type == "Split" and JOIN in (node.inputs[0].name or "" if node.inputs[0] else "")
    )


def parts_of(name: str) -> list[str]:
    """The names of the weights that a weight was joined of, its own where it was not."""
    return name.split(JOIN)
