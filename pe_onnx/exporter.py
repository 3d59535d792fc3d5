"""Export: a decoder, its encoding and a target to a bundle.

``config or checkpoint or module -> Exportable -> torch.onnx.export -> passes -> bundle``. Weights are streamed: they
stay where the module holds them and are turned and written one tensor at a time.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import logging
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pe_onnx import __version__, contract
from pe_onnx.bundle import MODEL, WEIGHTS, Bundle, check_output, read_bundle, sha256, write_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError, ExportError, PeOnnxError, did_you_mean, needs

with needs("export", "'pe-onnx[export]'"):
    import onnx
    import onnx_ir as ir
    import torch
    from onnx_ir.passes.common import InlinePass
    from onnxscript import optimizer
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
    from torch import nn

from pe_onnx.custom_ops import OPSET, translation_table
from pe_onnx.models.exportable import Exportable, from_config
from pe_onnx.passes.contract_names import ContractNames
from pe_onnx.passes.fused_norms import FusedNorms
from pe_onnx.passes.lean import lean
from pe_onnx.passes.transposed_weights import TransposedWeights

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""

EMBED_BELOW_BYTES = 1 << 20
"""Weights smaller than this stand in model.onnx itself."""

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers")


def export(
    source: nn.Module | str | Path | None = None,
    output: str | Path = "bundle",
    *,
    encoding: str | None = None,
    encoding_parameters: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    target: str = "ort",
    dtype: str = "fp32",
    logits: str | None = None,
    layers: int | None = None,
    kv_heads: int | None = None,
    head_size: int | None = None,
    force: bool = False,
    verbose: bool = False,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Export to the bundle folder ``output`` and return it.

    One of: ``encoding`` (with ``encoding_parameters``, ``preset`` and fields of DecoderConfig in ``config``) for our
    own decoder; ``model`` or a path as ``source`` for a checkpoint, a Hugging Face folder or a GGUF file; a module as
    ``source`` that follows the graph contract, ``module(input_ids, attention_mask, position_ids, past_key_values)``
    to logits and presents, with its ``layers``, ``kv_heads`` and ``head_size``.

    target: ``ort`` or ``portable``. dtype: ``fp32`` or ``fp16``. logits: ``last`` or ``all`` (default by target; a
    module's are what it gives).
    Raises ConfigError, CheckpointError for what is not understood, ExportError for what cannot be finished; then
    nothing is written.
    """
    one_of("target", target, contract.TARGETS)
    one_of("dtype", dtype, contract.DTYPES)
    given_logits, logits = logits, logits or contract.DEFAULT_LOGITS[target]
    one_of("logits", logits, contract.LOGITS)
    check_output(Path(output), force)
    if isinstance(source, str | Path):
        source, model = None, source
    given = [name for name, x in (("a module", source), ("encoding", encoding), ("model", model)) if x is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of encoding, model and a module; received {' and '.join(given) or 'none'}")

    belonging: dict[str, dict[str, Any]] = {
        "encoding": {"encoding_parameters": encoding_parameters, "preset": preset, "config": config},
        "a module": {"layers": layers, "kv_heads": kv_heads, "head_size": head_size},
    }
    for kind, options in belonging.items():
        astray = [name for name, value in options.items() if value is not None]
        if astray and given != [kind]:
            raise ConfigError(f"{astray[0]} is for {kind}; received {given[0]}")
    quiet = contextlib.nullcontext() if verbose else silenced()
    with quiet:
        progress("load")
        last_only = logits == "last"
        if encoding is not None:
            for key in {"encoding", "encoding_parameters"} & (config or {}).keys():
                raise ConfigError(f"{key!r} cannot stand among the configuration's fields: it has its own argument")
            fields = {
                "encoding": encoding,
                "encoding_parameters": dict(encoding_parameters or {}),
                **(config or {}),
            }
            preset = preset or "tiny"
            resolved = DecoderConfig.preset(preset, **fields)
            exportable = from_config(resolved, cast(contract.Target, target), last_only, preset)
        elif model is not None:
            with needs("a checkpoint", "'pe-onnx[export]'"):
                from pe_onnx.models.bridge import from_checkpoint

            exportable = from_checkpoint(Path(model), cast(contract.Target, target), last_only)
        else:
            assert source is not None
            if dtype == "fp16":
                source = copy.deepcopy(source)  # the caller's own keeps its precision
            exportable, found = _from_module(source, layers, kv_heads, head_size)
            if given_logits not in (None, found):
                raise ConfigError(f"logits = {given_logits!r}, and the module gives the logits of {found}")
            logits = found
        if dtype == "fp16":
            _halve(exportable.module)
        onnx_model = to_onnx(exportable, target, dtype, logits, progress)
        return _write(onnx_model, exportable, Path(output), target, dtype, logits, force, progress)


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
    past = [
        tuple(torch.zeros(batch, E.kv_heads, before, E.head_size, dtype=torch_dtype) for _ in range(2))
        for _ in range(E.layers)
    ]
    lengths = (new, before + new, new)
    args = (*(torch.ones(batch, length, dtype=torch.int64) for length in lengths), past)
    dynamic = torch.export.Dim.DYNAMIC
    rows = {0: dynamic, 1: dynamic}
    shapes = (rows, rows, rows, [({0: dynamic, 2: dynamic},) * 2] * E.layers)
    try:
        with torch.no_grad():
            program = torch.export.export(E.module, args, dynamic_shapes=shapes, strict=False)
        progress("translate")
        onnx_program = torch.onnx.export(
            program,
            input_names=list(contract.input_shapes(E.layers, E.kv_heads, E.head_size)),
            output_names=["logits", *contract.present_names(E.layers)],
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
            contract.input_shapes(E.layers, E.kv_heads, E.head_size),
            contract.output_shapes(E.layers, E.kv_heads, E.head_size, E.vocab_size, logits),
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


def _write(
    model: ir.Model,
    exportable: Exportable,
    output: Path,
    target: str,
    dtype: str,
    logits: str,
    force: bool,
    progress: Progress,
) -> Bundle:
    manifest = _manifest(model, exportable, target, dtype, logits)
    for key in ("encoding", "target", "dtype", "logits", "tools"):
        value = manifest[key]
        model.metadata_props[f"pe_onnx.{key}"] = value if isinstance(value, str) else json.dumps(value)
    model.metadata_props["pe_onnx.contract"] = str(contract.VERSION)
    progress("write")
    with write_bundle(output, manifest, force) as folder:
        embedded = manifest["graph"]["weight_bytes"] < EMBED_BELOW_BYTES
        ir.save(model, folder / MODEL, external_data=None if embedded else WEIGHTS)
        if not embedded:
            _add_metadata(folder / MODEL, "pe_onnx.weights_sha256", sha256(folder / WEIGHTS))
        for name, values in (
            ("config", exportable.config),
            ("generation_config", exportable.generation_config),
        ):
            (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        exportable.write_assets(folder)
    return read_bundle(output, verify=False)


def _check_operators(model: ir.Model, target: str) -> None:
    """Raises ConfigError for a module whose attention is the other target's: its runtime would pad the wrong side."""
    used = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    wrong = {"portable": {"CachedAttention", "GroupQueryAttention"}, "ort": {"MaskedAttention"}}[target] & used
    if wrong:
        other = "ort" if target == "portable" else "portable"
        raise ConfigError(f"target = {target!r}, and the module uses {min(wrong)}, which is for target {other!r}")


def _add_metadata(path: Path, key: str, value: str) -> None:
    """To a model whose weights stand in another file, which is not touched."""
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, key: value})
    path.write_bytes(proto.SerializeToString())


def _manifest(model: ir.Model, e: Exportable, target: str, dtype: str, logits: str) -> dict[str, Any]:
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph)
    return {
        "format": 1,
        "contract": contract.VERSION,
        "target": target,
        "dtype": dtype,
        "logits": logits,
        "encoding": {"name": e.encoding, "parameters": e.parameters},
        "model": {
            "layers": e.layers,
            "kv_heads": e.kv_heads,
            "head_size": e.head_size,
            "vocab_size": e.vocab_size,
            "trained_length": e.trained_length,
            "max_length": e.max_length,
        },
        "tokenizer": e.tokenizer,
        "source": e.source,
        "graph": {
            "opsets": dict(model.opset_imports),
            "operators": dict(counts.most_common()),
            "functions": sorted(f"{f.domain}::{f.name}" for f in model.functions.values()),
            "weight_bytes": sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value),
        },
        "tools": {"pe-onnx": __version__, "python": platform.python_version(), **_tool_versions()},
    }


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions


class FloatLogits(nn.Module):
    """A module of the user's own, its logits in float32 as the contract has them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, Any]:
        """The graph contract's tensors in and out."""
        logits, presents = self.module(input_ids, attention_mask, position_ids, past_key_values)
        return logits.float(), presents


def _halve(module: nn.Module) -> None:
    """Weights to float16, one at a time; buffers keep their precision (inverse frequencies would be ruined).

    Raises ConfigError for a weight that float16 cannot hold.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            greatest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
            if greatest > torch.finfo(torch.float16).max:
                raise ConfigError(f"dtype = 'fp16' cannot hold {name}: its greatest weight is {greatest:.3g}; use fp32")
            parameter.data = parameter.data.half()


def _from_module(
    module: nn.Module, layers: int | None, kv_heads: int | None, head_size: int | None
) -> tuple[Exportable, str]:
    """A module of the user's own; the vocabulary, and whether it gives all logits, are read off a run."""
    sizes = {"layers": layers, "kv_heads": kv_heads, "head_size": head_size}
    missing = [name for name, value in sizes.items() if not value]
    if missing or layers is None or kv_heads is None or head_size is None:
        raise ConfigError(f"a module needs its cache's sizes: give {', '.join(missing)}")
    module = FloatLogits(module).eval()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    past = [(torch.zeros(1, kv_heads, 0, head_size, dtype=dtype),) * 2 for _ in range(layers)]
    mask = torch.ones(1, 2, dtype=torch.int64)
    with torch.no_grad():
        logits, presents = module(mask * 0, mask, torch.arange(2)[None], past)
    if len(presents) != layers:
        raise ConfigError(f"layers = {layers}, and the module returns {len(presents)} caches")
    own = type(module.module)
    exportable = Exportable(
        module=module,
        layers=layers,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=logits.shape[-1],
        encoding="module",
        parameters={},
        source={"kind": "module", "class": f"{own.__module__}.{own.__qualname__}"},
        config={"model_type": "pe_onnx", "architectures": [own.__qualname__], "vocab_size": logits.shape[-1]},
    )
    return exportable, "all" if logits.shape[1] == 2 else "last"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep the torch exporter's and transformers' chatter off the terminal; errors are raised, not logged."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def one_of(name: str, value: str, accepted: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raises ConfigError for a value that is not accepted."""
    if value not in accepted:
        hint = did_you_mean(value, accepted)
        raise ConfigError(f"{name} = {value!r} must be one of {', '.join(accepted)}{hint}")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
