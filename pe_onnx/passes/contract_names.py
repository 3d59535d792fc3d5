"""The contract's names for inputs, outputs and their symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from pe_onnx.contract import in_cache_dtype
from pe_onnx.errors import ExportError

Shapes = Mapping[str, tuple[str | int, ...]]


class ContractNames(ir.passes.InPlacePass):
    """Check shape and dtype of every input and output against the contract, and name its dimensions likewise.

    Shapes of values inside the graph are dropped: they carry the exporter's symbols, and some are tighter at run time
    (a bias that all rows share has batch 1).
    """

    def __init__(self, inputs: Shapes, outputs: Shapes, cache_dtype: ir.DataType) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.cache_dtype = cache_dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for values, shapes in ((model.graph.inputs, self.inputs), (model.graph.outputs, self.outputs)):
            names = [value.name for value in values]
            if names != list(shapes):
                raise ExportError(f"the exported graph has {names}, and the graph contract {list(shapes)}")
            for value in values:
                self._rename(value, shapes[value.name or ""])
        kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
        for node in model.graph:
            for output in node.outputs:
                if id(output) not in kept:
                    output.shape = None
        return ir.passes.PassResult(model, True)

    def _rename(self, value: ir.Value, shape: tuple[str | int, ...]) -> None:
        actual = list(value.shape or ())
        if len(actual) != len(shape):
            raise ExportError(f"{value.name} has shape {actual}, and the graph contract {list(shape)}")
        for have, want in zip(actual, shape, strict=True):
            known = isinstance(have, int) or have.value is not None
            if isinstance(want, int) and known and have != want:
                raise ExportError(f"{value.name} has shape {actual}, and the graph contract {list(shape)}")
            if isinstance(want, str) and isinstance(have, int):
                raise ExportError(f"{value.name}: {want} is fixed at {have}; the module's code ties it to a number")
        name = value.name or ""
        wanted = (
            self.cache_dtype if in_cache_dtype(name) else ir.DataType.FLOAT if name == "logits" else ir.DataType.INT64
        )
        if value.dtype != wanted:
            raise ExportError(f"{name} has dtype {value.dtype}, and the graph contract {wanted}")
        value.shape = ir.Shape(shape)
