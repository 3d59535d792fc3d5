"""Weights in the orientation they are multiplied in, so that a runtime need not transpose them at each load."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class TransposedWeights(ir.passes.InPlacePass):
    """Fold ``Transpose(weight)`` into the weight, lazily: the turned copy exists only while it is written.

    A weight that is read elsewhere too (an embedding tied to the head) stays as it is, once, and the product becomes
    Gemm with ``transB``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != ("", "Transpose") or list(node.attributes["perm"].as_ints()) != [1, 0]:
                continue
            weight = node.inputs[0]
            if weight is None or not weight.is_initializer() or weight.const_value is None:
                continue
            if len(weight.uses()) == 1:
                self._fold(model.graph, node, weight)
            else:
                self._use_gemm(model.graph, node, weight)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _fold(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        original = weight.const_value
        assert original is not None
        rows, columns = original.shape.numpy()
        turned = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(original.numpy().T), name=weight.name),
            dtype=original.dtype,
            shape=ir.Shape((columns, rows)),
            name=weight.name,
        )
        output = node.outputs[0]
        name = weight.name
        ir.convenience.replace_all_uses_with(output, weight)
        graph.remove(node, safe=True)
        weight.const_value = turned
        weight.shape = ir.Shape((columns, rows))
        weight.name = name

    def _use_gemm(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        assert weight.shape is not None
        out_size, in_size = weight.shape.numpy()
        for product, index in list(node.outputs[0].uses()):
            if product.op_type != "MatMul" or index != 1:
                continue
            tape = ir.tape.Tape()
            x = product.inputs[0]
            flat = tape.op("Reshape", [x, self._constant(graph, f"gemm_in_{in_size}", [-1, in_size])])
            multiplied = tape.op("Gemm", [flat, weight], attributes={"transB": 1})
            leading = tape.op("Shape", [x], attributes={"start": 0, "end": -1})
            shape = tape.op(
                "Concat", [leading, self._constant(graph, f"gemm_out_{out_size}", [out_size])], attributes={"axis": 0}
            )
            result = tape.op("Reshape", [multiplied, shape])
            old = product.outputs[0]
            result.shape, result.type, flat.type, multiplied.type = old.shape, old.type, old.type, old.type
            graph.insert_before(product, tape.nodes)
            ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
            result.name = old.name
            graph.remove(product, safe=True)
        if not node.outputs[0].uses():
            graph.remove(node, safe=True)

    def _constant(self, graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
        if name in graph.initializers:
            return graph.initializers[name]
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        value.shape, value.type = ir.Shape((len(values),)), ir.TensorType(ir.DataType.INT64)
        graph.initializers[name] = value
        return value
