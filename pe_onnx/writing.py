"""ONNX models and what their manifest says of them, written to a bundle and proven there."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_onnx import contract
from pe_onnx.bundle import (
    CUDA,
    DECODER,
    FORMAT,
    MERGED,
    MODEL,
    RUNTIME,
    WEIGHTS,
    Bundle,
    read_bundle,
    sha256,
    write_bundle,
)
from pe_onnx.errors import ConfigError, needs
from pe_onnx.machine import return_freed_memory, versions

with needs("export", "'pe-onnx[export]'"):
    import onnx_ir as ir
    from torch import nn

from pe_onnx.models.exportable import Exportable
from pe_onnx.passes.alibi_channels import AlibiChannels
from pe_onnx.passes.quantized_weights import storage_of
from pe_onnx.passes.rotating_attention import RotatingAttention
from pe_onnx.passes.whole_bias import WholeBias
from pe_onnx.passes.window_cache import WindowCache
from pe_onnx.tracing import Progress

EMBED_BELOW_BYTES = 1 << 20
"""Weights smaller than this stand in the ONNX file itself."""
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
EXTERNAL_FROM_BYTES = 257
"""Smaller tensors stand in the ONNX file in any case."""

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers")


def write(
    models: Mapping[str, ir.Model],
    exportable: Exportable,
    output: Path,
    target: str,
    dtype: str,
    logits: str,
    force: bool,
    verify: bool,
    progress: Progress,
    window_cache: bool = False,
) -> Bundle:
    """models: by file name."""
    manifest = _manifest(models, exportable, target, dtype, logits)
    for model in models.values():
        for key in ("encoding", "target", "dtype", "logits", "tools"):
            value = manifest[key]
            model.metadata_props[f"pe_onnx.{key}"] = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props["pe_onnx.contract"] = str(contract.VERSION)
    progress("write")
    with write_bundle(output, manifest, force) as folder:
        save(models, folder, embedded=manifest["graph"]["weight_bytes"] < EMBED_BELOW_BYTES)
        if target == "portable" and DECODER in models:
            _write_merged(folder, exportable)
        if not window_cache:
            manifest["model"] |= write_runtime(folder)
        for name, values in (
            ("config", exportable.config),
            ("generation_config", exportable.generation_config),
        ):
            (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        exportable.write_assets(folder)
        manifest["proof"] = {"verified": False}
        if verify and exportable.proof is not None:
            progress("verify")
            for model in models.values():
                for value in model.graph.initializers.values():
                    value.const_value = None
            exportable.module = nn.Module()
            gc.collect()
            return_freed_memory()  # the place of the weights is onnxruntime's now
            from pe_onnx.verification import verify as run_proof  # needs onnxruntime

            manifest["proof"] = run_proof(Bundle(folder, manifest), exportable.proof)
        if window_cache:
            manifest["model"]["windows"] = _cut_to_windows(folder / MODEL, len(exportable.caches))
    return read_bundle(output, verify=False)


def save(models: Mapping[str, ir.Model], folder: Path, embedded: bool) -> None:
    """The ONNX files, and one file of weights for all of them, in which each tensor stands once.

    embedded: weights stand in the ONNX files themselves.
    """
    large: dict[object, list[ir.Value]] = {}
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not embedded and tensor.nbytes >= EXTERNAL_FROM_BYTES:
                large.setdefault(storage_of(tensor), []).append(value)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)
    if large:
        tensors = [tensor for values in large.values() if (tensor := values[0].const_value) is not None]
        external = ir.external_data.convert_tensors_to_external(tensors, folder, WEIGHTS)
        for values, tensor in zip(large.values(), external, strict=True):
            assert isinstance(tensor, ir.ExternalTensor)
            for value in values:
                value.const_value = _same_bytes(tensor, value)
        checksum = sha256(folder / WEIGHTS)
    for name, model in models.items():
        if large:
            model.metadata_props["pe_onnx.weights_sha256"] = checksum
        ir.save(model, folder / name)


def _same_bytes(tensor: ir.ExternalTensor, value: ir.Value) -> ir.ExternalTensor:
    """The tensor under the name and shape that a value has."""
    assert value.const_value is not None
    shape = ir.Shape(value.const_value.shape.numpy())
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=shape,
        name=value.name or "",
        base_dir=tensor.base_dir,
    )


def write_runtime(folder: Path) -> dict[str, Any]:
    """The decoder once more as our sessions run it: with rotations inside attention, where it has such, and in half
    precision, which is for CUDA, ALiBi in channels of the heads and other biases of fixed shapes. On the CPU only where
    weights are a file beside the graphs. Returns what the manifest's ``model`` has to say of it.
    """
    if not (folder / MODEL).exists():
        return {}
    model = ir.load(folder / MODEL)
    half = any(value.dtype in HALF for value in model.graph.inputs)
    if not half and not (folder / WEIGHTS).exists():
        return {}
    rotated = RotatingAttention()(model).modified
    if not half:
        if rotated:
            ir.save(model, folder / RUNTIME)
        return {}
    channels = AlibiChannels()
    if any([rotated, channels(model).modified, WholeBias()(model).modified]):
        ir.save(model, folder / CUDA)
    return {} if channels.bits is None else {"cuda_position_bits": channels.bits}


def _cut_to_windows(path: Path, layers: int) -> list[int]:
    """Set WindowCache in a graph that was written, and proven with a cache that grows; each layer's window."""
    windowed = WindowCache(layers)
    model = ir.load(path)
    windowed(model)
    if not any(windowed.windows):
        raise ConfigError("window_cache = True, and no layer of this model has a sliding window; export it without")
    ir.save(model, path)
    return windowed.windows


def _write_merged(folder: Path, e: Exportable) -> None:
    """The decoder once more, under optimum's name.

    At the first step optimum takes the head size of the empty past to be C / K. Where it is another, as in the small
    sizes of T5 v1.1, the inputs leave it open, and the decoder's own past is reshaped, which copies nothing.
    """
    crossing = e.crossing
    if crossing is None or all(crossing.width == K * D for K, D in (*e.caches, *crossing.caches)):
        shutil.copyfile(folder / DECODER, folder / MERGED)
        return
    model = ir.load(folder / DECODER)
    nodes = []
    for value in model.graph.inputs:
        name, shape = value.name or "", value.shape
        if not name.startswith("past_key_values") or shape is None:
            continue
        value.shape = ir.Shape([*shape[:3], "head_size"])
        if ".decoder." in name:
            own = ir.Value(shape=shape, type=value.type)
            value.replace_all_uses_with(own)
            target = ir.node("Constant", [], {"value_ints": [0, 0, 0, shape[3]]})  # 0 keeps a length, of 0 too
            nodes += [target, ir.node("Reshape", [value, target.outputs[0]], outputs=[own])]
    model.graph.insert_before(model.graph[0], nodes)
    ir.save(model, folder / MERGED)


def _manifest(models: Mapping[str, ir.Model], e: Exportable, target: str, dtype: str, logits: str) -> dict[str, Any]:
    crossing = e.crossing
    return {
        "format": FORMAT,
        "contract": contract.VERSION,
        "target": target,
        "dtype": dtype,
        "logits": logits,
        "encoding": {
            "name": e.encoding,
            "parameters": e.parameters,
            "path_dependent": e.path_dependent,
            "ignored": e.ignored,
        },
        "model": {
            "caches": [list(cache) for cache in e.caches],
            "layers": e.layers or len(e.caches),
            "vocab_size": e.vocab_size,
            "score_heads": max((_score_heads(node) for m in models.values() for node in m.graph), default=0),
            "trained_length": e.trained_length,
            "max_length": e.max_length,
            "encoder": crossing
            and {
                "width": crossing.width,
                "caches": [list(cache) for cache in crossing.caches],
                "start_token": e.start_token,
            },
        },
        "tokenizer": e.tokenizer,
        "source": e.source,
        "graph": described(models),
        "tools": versions(TOOLS),
    }


def described(models: Mapping[str, ir.Model]) -> dict[str, Any]:
    """The manifest's entry on what the graphs hold."""
    graphs = [model.graph for model in models.values()]
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for graph in graphs for node in graph)
    functions = {f"{f.domain}::{f.name}" for model in models.values() for f in model.functions.values()}
    weights = {
        storage_of(v.const_value): v.const_value.nbytes
        for g in graphs
        for v in g.initializers.values()
        if v.const_value
    }
    return {
        "opsets": {domain: n for model in models.values() for domain, n in model.opset_imports.items()},
        "operators": dict(counts.most_common()),
        "functions": sorted(functions),
        "weight_bytes": sum(weights.values()),
    }


def _score_heads(node: ir.Node) -> int:
    """H of a tensor [H, T, S]: at fused attention a bias, or the scores that a soft-cap or sinks have materialised; at
    the portable target's the scores."""
    if node.op_type == "MaskedAttention":
        return node.attributes.get_int("num_heads", 0)
    if node.op_type != "CachedAttention":
        return 0
    fused = not any(node.inputs[7:]) and not node.attributes.get_float("softcap")
    return 0 if fused else node.attributes.get_int("num_heads")
