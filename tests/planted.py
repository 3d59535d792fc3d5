"""Faults planted into the ONNX file of a right bundle, each of a kind that exporters have been seen to make."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

Fault = Callable[[ir.Model], None]


def plant(source: Path, folder: Path, fault: Fault, file: str = "model.onnx") -> Path:
    """A copy of a bundle with a fault, its checksums right."""
    shutil.copytree(source, folder)
    path = folder / file
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
    fault(model)
    ir.save(model, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def nodes(model: ir.Model, op_type: str, scope: str = "") -> list[ir.Node]:
    """Of one type, in a module."""
    return [n for n in model.graph if n.op_type == op_type and (n.name or "").startswith(scope)]


def before(node: ir.Node, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
    """The output of a new node."""
    new = ir.node(op_type, inputs, attributes, domain=domain)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new.outputs[0]


def constant(model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.initializers[name] = value
    return value


def attention(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type in ("CachedAttention", "MaskedAttention")]


def theta(layer: str) -> Fault:
    """The rotation of one layer has another base."""

    def fault(model: ir.Model) -> None:
        rotations = nodes(model, "RotaryEmbedding", layer)
        cos = rotations[0].inputs[1]
        while cos.producer().op_type != "Cos":
            cos = cos.producer().inputs[0]
        positions, frequencies = cos.producer().inputs[0].producer().inputs
        tables = frequencies.const_value.numpy()
        wrong = constant(model, "wrong_frequencies", (tables**1.1).astype(tables.dtype))
        angle = before(rotations[0], "Mul", positions, wrong)
        for index, op_type in ((1, "Cos"), (2, "Sin")):
            table = before(rotations[0], "Cast", before(rotations[0], op_type, angle), to=1)
            for node in rotations:
                node.replace_input_with(index, table)

    return fault


def rotated(layer: str) -> Fault:
    """A layer without positions is rotated like the others."""

    def fault(model: ir.Model) -> None:
        (node,) = [n for n in attention(model) if n.name.startswith(layer)]
        like = nodes(model, "RotaryEmbedding")[0]
        assert node.inputs[0].producer().op_type != "RotaryEmbedding"
        for index in (0, 1):
            inputs = (node.inputs[index], *like.inputs[1:])
            new = ir.node("RotaryEmbedding", inputs, dict(like.attributes.items()), domain="pe_onnx")
            model.graph.insert_before(node, new)
            node.replace_input_with(index, new.outputs[0])

    return fault


def transposed_table(name: str) -> Fault:
    """The bias table read with buckets and heads exchanged."""

    def fault(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        table = value.const_value.numpy()
        value.const_value = ir.Tensor(np.ascontiguousarray(table.T).reshape(table.shape), name=name)

    return fault


def shifted_mask(model: ir.Model) -> None:
    """A query sees the token behind it."""
    node = nodes(model, "LessOrEqual")[0]
    node.replace_input_with(1, before(node, "Add", node.inputs[1], constant(model, "one", np.array(1))))


def shifted_window(model: ir.Model) -> None:
    """A window that is a token too short."""
    node = attention(model)[0]
    node.attributes["window"] = ir.AttrInt64("window", node.attributes.get_int("window") - 1)


def slot(layer: str, by: int) -> Fault:
    """The cache of one layer is written a slot further back or ahead."""

    def fault(model: ir.Model) -> None:
        (node,) = [n for n in attention(model) if n.name.startswith(layer)]
        moved = before(node, "Add", node.inputs[5], constant(model, "by", np.array(by, np.int32)))
        node.replace_input_with(5, before(node, "Max", moved, constant(model, "zero", np.array(0, np.int32))))

    return fault


def later_slot(layer: str) -> Fault:
    """The cache of one layer is written a slot too early from the 17th token on, in single steps."""

    def fault(model: ir.Model) -> None:
        (node,) = [n for n in attention(model) if n.name.startswith(layer)]
        slots = node.inputs[5]
        late = before(node, "Greater", slots, constant(model, "bound", np.array(16, np.int32)))
        node.replace_input_with(5, before(node, "Sub", slots, before(node, "Cast", late, to=6)))

    return fault


def half_table(model: ir.Model) -> None:
    """The cos table has been through float16."""
    rotations = nodes(model, "RotaryEmbedding")
    for table in {id(n.inputs[1]): n.inputs[1] for n in rotations}.values():
        half = before(rotations[0], "Cast", table, to=10)
        back = before(rotations[0], "Cast", half, to=1)
        for node in rotations:
            if node.inputs[1] is table:
                node.replace_input_with(1, back)


def scaled_weight(name: str, factor: float = 1.01) -> Fault:
    def fault(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=name)

    return fault
