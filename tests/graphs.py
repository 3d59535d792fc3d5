"""Small graphs by hand, run before and after a pass: what the tests of the passes share."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime

from pe_onnx.custom_ops.rotary_embedding import RotaryEmbedding

FLOAT = ir.TensorType(ir.DataType.FLOAT)


class GraphMaker:
    """Nodes one after another. Sizes are numbers, or names for symbols; ``None`` leaves a size unnamed."""

    def __init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 23, "pe_onnx": 1})
        self.rng = np.random.default_rng(0)
        self.count = 0

    def input(self, name: str, *shape: int | str | None) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)
        self.graph.inputs.append(value)
        return value

    def const(self, values: object, dtype: type = np.int64) -> ir.Value:
        array = np.array(values, dtype)
        self.count += 1
        value = ir.Value(name=f"const_{self.count}", const_value=ir.tensor(array))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.initializers[value.name or ""] = value
        return value

    def op(self, op_type: str, *inputs: ir.Value, shape: list[object] | None = None, **attributes: object) -> ir.Value:
        return self.ops(op_type, *inputs, shapes=[shape], **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value, shapes: list[list[object] | None], **attributes: object
    ) -> list[ir.Value]:
        domain = "pe_onnx" if op_type == "RotaryEmbedding" else ""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=len(shapes))  # type: ignore[arg-type]
        for output, shape in zip(node.outputs, shapes, strict=True):
            self.count += 1
            output.name, output.type = f"value_{self.count}", FLOAT
            output.shape = None if shape is None else ir.Shape(shape)  # type: ignore[arg-type]
        self.graph.append(node)
        return list(node.outputs)

    def rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value, R: int, interleaved: int = 0) -> ir.Value:
        shape = list(x.shape or ())
        return self.op("RotaryEmbedding", x, cos, sin, shape=shape, num_heads=0, interleaved=interleaved, rotary_dim=R)

    def slice(self, x: ir.Value, start: int, stop: int, step: int = 1) -> ir.Value:
        shape = list(x.shape or ())
        width = len(range(*slice(start, stop, step).indices(shape[-1])))
        bounds = [self.const([n]) for n in (start, stop, len(shape) - 1, step)]
        return self.op("Slice", x, *bounds, shape=[*shape[:-1], width])

    def heads_first(self, x: ir.Value) -> ir.Value:
        B, T, H, D = x.shape or ()
        return self.op("Transpose", x, shape=[B, H, T, D], perm=[0, 2, 1, 3])

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        shape = list(x.shape or ())
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 1)
        return self.op("Unsqueeze", x, self.const([axis]), shape=shape)

    def reshape(self, x: ir.Value, target: list[int], shape: list[object], **attributes: object) -> ir.Value:
        return self.op("Reshape", x, self.const(target), shape=shape, **attributes)

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        model = ir.Model(self.graph, ir_version=10)
        function = ir.serde.deserialize_function(RotaryEmbedding.to_function_proto())
        model.functions[function.identifier()] = function
        return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """In onnxruntime, as written: its own optimizer does nothing. Symbols need not hold between inputs."""
    ir.passes.common.NameFixPass()(model)
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def feeds(model: ir.Model, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs; a symbol has the size given for its name."""
    rng = np.random.default_rng(7)
    shapes = {
        v.name: [n if isinstance(n, int) else sizes[n.value or "unnamed"] for n in v.shape] for v in model.graph.inputs
    }
    return {str(name): rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def apply(a_pass: ir.passes.PassBase, model: ir.Model, tolerance: float = 1e-6, **sizes: int) -> bool:
    """Run the pass; what it says it did must be what it did, and the outputs must stay what they were."""
    given = feeds(model, **{"B": 2, "T": 5, "unnamed": 2, **sizes})
    before, nodes = run(model, given), list(model.graph)
    graph = ir.serde.serialize_model(model).graph.SerializeToString()
    modified = a_pass(model).modified
    after = run(model, given)
    assert len(before) == len(after)
    for want, have in zip(before, after, strict=True):
        assert want.shape == have.shape
        assert np.abs(want - have).max() <= tolerance
    if not modified:
        assert list(model.graph) == nodes
        assert ir.serde.serialize_model(model).graph.SerializeToString() == graph
    else:
        assert not a_pass(model).modified  # once is enough
    return modified


SIZES = {"Shape", "Size"}
KEPT_ON_THE_HOST = {
    *("Squeeze", "Unsqueeze", "Cast", "CastLike", "Add", "Sub", "Mul", "Div", "Expand", "Concat", "Gather", "Reshape"),
}
READ_ON_THE_HOST: dict[str, tuple[int, ...]] = {
    **{"Range": (0, 1, 2), "Expand": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "ReduceSum": (1,), "Reshape": (1,)},
    **{"ConstantOfShape": (0,), "Slice": (1, 2, 3, 4), "Split": (1,), "GroupQueryAttention": (6,)},
}
"""Inputs of an operator that onnxruntime's CUDA kernels read on the host."""


def is_integer(constant: ir.Value | None) -> bool:
    """What is made of sizes and of floats, a mask of zeros say, is made on the device."""
    tensor = ir.convenience.get_const_tensor(constant) if constant is not None else None
    return tensor is not None and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def host_numbers_on_a_device(model: onnx.ModelProto) -> list[str]:
    """Where a graph, functions inlined, hands the size of a run to a device, which no CUDA graph can record.

    onnxruntime knows sizes on the host, and computes on it what is computed of sizes alone. Where one meets numbers of
    the device it is copied there, unless the kernel reads it on the host.
    """
    graph = ir.from_proto(onnx.inliner.inline_local_functions(model)).graph
    host: set[ir.Value] = set()
    constants: set[ir.Value | None] = {None, *graph.initializers.values()}
    found = []
    for node in graph:
        if node.op_type not in SIZES and constants.issuperset(node.inputs):
            constants.update(node.outputs)
        elif node.op_type in SIZES or (
            node.op_type in KEPT_ON_THE_HOST
            and (constants | host).issuperset(node.inputs)
            and (node.inputs[0] in host or is_integer(node.inputs[0]))
        ):
            host.update(node.outputs)
        else:
            read = READ_ON_THE_HOST.get(node.op_type, ())
            found += [
                f"{node.op_type} reads {x.name}" for i, x in enumerate(node.inputs) if x in host and i not in read
            ]
    return found
