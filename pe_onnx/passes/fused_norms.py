"""Root-mean-square norms spelled out, to RMSNormalization: those that onnxscript's own fusion leaves.

Zhang and Sennrich 2019, equation 4. onnxscript fuses a norm with weights in the usual order of factors; this pass takes
norms without weights (nanochat), and gives those of half-precision values with float32 weights (Gemma) one dtype, as
onnxruntime's kernel needs it. It runs before constants are simplified: onnxscript takes an epsilon of 1e-8 for 0 and
drops its Add, and a row of zeros would then become NaN.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pe_onnx.passes.nodes import insert, made_by, numbers, replace, sizes

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class FusedNorms(ir.passes.InPlacePass):
    """``x * Reciprocal(Sqrt(ReduceMean(x^2, -1) + epsilon))`` to RMSNormalization with weights of 1.

    x is float32 and its last size a number. A norm that makes an output of the graph stays as it is. A fused norm whose
    weights alone are float32, and so its result, reads x in float32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == ("", "Mul") and node.graph is not None:
                modified |= self._fuse(model.graph, node)
            if (node.domain, node.op_type) == ("", "RMSNormalization"):
                modified |= self._widen(node)
        return ir.passes.PassResult(model, modified)

    def _fuse(self, graph: ir.Graph, mul: ir.Node) -> bool:
        if mul.outputs[0].is_graph_output():
            return False
        for x, factor in (mul.inputs, reversed(mul.inputs)):
            epsilon = self._epsilon(x, factor)
            shape = sizes(x)
            if epsilon is None or x is None or x.dtype != ir.DataType.FLOAT or not shape:
                continue
            if not isinstance(width := shape[-1], int):
                continue
            attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            inputs = [x, _ones(graph, width)]
            replace(mul.outputs[0], insert(mul, "RMSNormalization", inputs, shape, attributes))
            return True
        return False

    def _widen(self, norm: ir.Node) -> bool:
        x, weights = norm.inputs[:2]
        if x is None or weights is None or x.dtype not in HALF or weights.dtype != ir.DataType.FLOAT:
            return False
        wide = insert(norm, "Cast", [x], sizes(x) or [], {"to": ir.DataType.FLOAT})
        wide.shape, wide.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
        norm.replace_input_with(0, wide)
        return True

    def _epsilon(self, x: ir.Value | None, factor: ir.Value | None) -> float | None:
        """Of ``1 / sqrt(mean(x^2) + epsilon)``, None for any other factor."""
        reciprocal = made_by(factor, "Reciprocal")
        root = made_by(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
        add = made_by(root.inputs[0], "Add") if root is not None else None
        mean = made_by(add.inputs[0], "ReduceMean") if add is not None else None
        square = made_by(mean.inputs[0], "Pow") if mean is not None else None
        if add is None or mean is None or square is None or square.inputs[0] is not x:
            return None
        epsilon, exponent, rank = numbers(add.inputs[1]), numbers(square.inputs[1]), len(sizes(x) or ())
        if numbers(mean.inputs[1]) not in ([-1], [rank - 1]) or exponent != [2.0] or epsilon is None:
            return None
        kept = "keepdims" not in mean.attributes or mean.attributes["keepdims"].as_int() == 1
        return float(epsilon[0]) if kept and len(epsilon) == 1 else None


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    """Weights of 1, one for equal widths."""
    name = f"pe_onnx_ones_{width}"
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.ones(width, np.float32), name=name))
        value.shape, value.type = ir.Shape((width,)), ir.TensorType(ir.DataType.FLOAT)
        graph.initializers[name] = value
    return graph.initializers[name]
