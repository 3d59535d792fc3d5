"""A module that follows the graph contract to an ONNX model: traced, translated, made lean.

``torch.export -> torch.onnx.export -> passes``. Weights stay where the module holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from pe_onnx import __version__, contract
from pe_onnx.errors import ConfigError, ExportError, PeOnnxError, needs

with needs("export", "'pe-onnx[export]'"):
    import onnx_ir as ir
    import torch
    from onnx_ir.passes.common import InlinePass
    from onnxscript import optimizer
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from pe_onnx.custom_ops import OPSET, translation_table
from pe_onnx.models.exportable import Exportable
from pe_onnx.passes.contract_names import ContractNames
from pe_onnx.passes.fused_norms import FusedNorms
from pe_onnx.passes.lean import lean
from pe_onnx.passes.transposed_weights import TransposedWeights

LARGEST = sys.maxsize - 1
"""The bound that torch gives a size of which it knows nothing, as of what ``x[mask]`` picks."""

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""


def to_onnx(
    exportable: Exportable, target: str, dtype: str, logits: str, progress: Progress = lambda stage: None
) -> ir.Model:
    """The ONNX model in memory, weights still the module's own."""
    progress("trace")
    torch_dtype = getattr(torch, contract.DTYPES[dtype])
    E = exportable
    # sizes that differ from each other and from 1, lest two dimensions be taken for one, and a tensor of its own for
    # each input, lest two inputs be
    batch, new, before = 2, 3, 5
    past = [tuple(torch.zeros(batch, K, before, D, dtype=torch_dtype) for _ in range(2)) for K, D in E.caches]
    lengths = (new, before + new, new)
    args = (*(torch.ones(batch, length, dtype=torch.int64) for length in lengths), past)
    dynamic = torch.export.Dim.DYNAMIC
    rows = {0: dynamic, 1: dynamic}
    shapes = (rows, rows, rows, [({0: dynamic, 2: dynamic},) * 2] * len(E.caches))
    try:
        with torch.no_grad():
            program = torch.export.export(E.module, args, dynamic_shapes=shapes, strict=False)
        _check_lengths(program, E.max_length)
        progress("translate")
        onnx_program = torch.onnx.export(
            program,
            input_names=list(contract.input_shapes(E.caches)),
            output_names=["logits", *contract.present_names(len(E.caches))],
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            optimize=False,
            dynamo=True,
            verbose=False,
        )
        assert onnx_program is not None
        model = onnx_program.model
        _check_operators(model, target)
        progress("optimize")
        TransposedWeights()(model)
        InlinePass()(model)
        optimizer.fold_constants(model)
        fuse_rms_normalization(model)
        FusedNorms()(model)  # before the optimizer takes a small epsilon for 0
        optimizer.optimize_ir(model, inline=False)
        fuse_rms_normalization(model)  # those whose differences it has found equal (Cohere)
        lean()(model)
        optimizer.optimize_ir(model, inline=False)
        ContractNames(
            contract.input_shapes(E.caches),
            contract.output_shapes(E.caches, E.vocab_size, logits),
            {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}[dtype],
        )(model)
    except PeOnnxError:
        raise
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, PeOnnxError):
            raise cause from error
        first_line = str(cause).strip().split("\n", 1)[0]
        raise ExportError(f"the exporter failed: {type(cause).__name__}: {first_line}") from error
    if target == "ort":
        model.opset_imports["com.microsoft"] = 1
    model.producer_name, model.producer_version = "pe-onnx", __version__
    model.graph.name = "decoder"
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
    return model


def _check_lengths(program: torch.export.ExportedProgram, limit: int | None) -> None:
    """Raises ExportError where the module's code takes another way for longer inputs: the graph has the one traced."""
    for name, values in program.range_constraints.items():
        bound = values.upper
        if bound.is_Integer and int(bound) < (LARGEST if limit is None else limit):
            raise ExportError(f"the module's code takes another way where a size ({name}) is more than {int(bound)}")


def _check_operators(model: ir.Model, target: str) -> None:
    """Raises ConfigError for a module whose attention is the other target's: its runtime would pad the wrong side."""
    used = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    wrong = {"portable": {"CachedAttention", "GroupQueryAttention"}, "ort": {"MaskedAttention"}}[target] & used
    if wrong:
        other = "ort" if target == "portable" else "portable"
        raise ConfigError(f"target = {target!r}, and the module uses {min(wrong)}, which is for target {other!r}")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
