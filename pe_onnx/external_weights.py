"""Weights in a file beside their graph, read through onnx-ir though the file has a second name, as in a package.

onnx-ir takes a second name for an attack: a link to a file that is none of the reader's business. A bundle's manifest
has the SHA-256 of every file, which tells the same more surely.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pe_onnx.errors import needs

with needs("reading a graph", "'pe-onnx[export]'"):
    import onnx_ir as ir


def load(path: Path) -> ir.Model:
    """The model, its weights yet to be read."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        value.const_value = readable(value.const_value)
    return model


def readable(tensor: Any) -> Any:
    """The tensor, by the whole path of its file, of which onnx-ir asks nothing."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.ExternalTensor(
        os.path.abspath(tensor.path),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir="",
    )


def move(model: ir.Model, weights: Path) -> None:
    """Have a model, which is going to stand beside ``weights``, read what lies in another file from there."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                weights.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=weights.parent,
            )
