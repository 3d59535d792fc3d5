"""A module that follows the graph contract to an ONNX model: traced, translated, made lean.

``torch.export -> torch.onnx.export -> passes``. Weights stay where the module holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pe_onnx import __version__
from pe_onnx.bundle import ENCODER
from pe_onnx.errors import ConfigError, ExportError, PeOnnxError, first_line, needs

with needs("export", "'pe-onnx[export]'"):
    import onnx_ir as ir
    import torch
    from onnx_ir.passes.common import InlinePass
    from onnxscript import optimizer
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from pe_onnx.custom_ops import OPSET, translation_table
from pe_onnx.decomposition import values_as_traced, without_tracing
from pe_onnx.models.parts import Part
from pe_onnx.passes.contract_names import ContractNames
from pe_onnx.passes.fused_norms import FusedNorms
from pe_onnx.passes.fused_projections import FusedProjections
from pe_onnx.passes.lean import lean
from pe_onnx.passes.scoped_names import ScopedNames, scoped_names
from pe_onnx.passes.skip_norms import SkipNorms
from pe_onnx.passes.tidied import tidied
from pe_onnx.passes.transposed_weights import TransposedWeights

LARGEST = sys.maxsize - 1
"""The bound that torch gives a size of which it knows nothing, as of what ``x[mask]`` picks."""

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""


def to_onnx(
    part: Part, limit: int | None, target: str, dtype: str, progress: Progress = lambda stage: None
) -> ir.Model:
    """The ONNX model in memory, weights still the module's own. limit: tokens the encoding can take."""
    with _named_failures():
        model, program = _translate(part, limit, progress)
        _check_operators(model, target)
        progress("optimize")
        ScopedNames(scoped_names(program.graph))(model)
        TransposedWeights()(model)
        InlinePass()(model)
        optimizer.fold_constants(model)
        fuse_rms_normalization(model)
        FusedNorms()(model)  # before the optimizer takes a small epsilon for 0
        tidied()(model)
        fuse_rms_normalization(model)  # those whose differences it has found equal (Cohere)
        lean()(model)
        tidied()(model)
        FusedProjections()(model)
        if target == "ort":
            SkipNorms()(model)
        names = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
        cache_dtype = names[dtype]
        ContractNames(part.inputs, part.outputs, cache_dtype)(model)
    if target == "ort":
        model.opset_imports["com.microsoft"] = 1
    model.producer_name, model.producer_version = "pe-onnx", __version__
    model.graph.name = "encoder" if part.file == ENCODER else "decoder"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
    return model.clone()  # the graph's own lists keep what has left it, and with it every weight that was joined


def to_program(part: Part, limit: int | None) -> torch.export.ExportedProgram:
    """The operations that the ONNX model was translated from, to be run in PyTorch one by one. limit: as of
    ``to_onnx``."""
    with _named_failures():
        return _translate(part, limit, lambda stage: None)[1]


def _translate(part: Part, limit: int | None, progress: Progress) -> tuple[ir.Model, torch.export.ExportedProgram]:
    """The ONNX model as it was translated, and the program of which."""
    progress("trace")
    with torch.no_grad():
        program = torch.export.export(part.module, part.args, dynamic_shapes=part.dynamic_shapes, strict=False)
    _check_lengths(program, limit)
    progress("translate")
    with values_as_traced():
        translated = without_tracing(
            program,
            lambda: torch.onnx.export(
                program,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                opset_version=OPSET,
                custom_translation_table=translation_table(),
                optimize=False,
                dynamo=True,
                verbose=False,
            ),
        )
    assert translated is not None
    assert translated.exported_program is not None
    return translated.model, translated.exported_program


@contextmanager
def _named_failures() -> Iterator[None]:
    """What the exporter raises is an ExportError with its cause's first line; our own errors stay what they are."""
    try:
        yield
    except PeOnnxError:
        raise
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, PeOnnxError):
            raise cause from error
        raise ExportError(f"the exporter failed: {type(cause).__name__}: {first_line(cause)}") from error


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
