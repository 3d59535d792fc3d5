"""An ONNX model and what its manifest says of it, written to a bundle and proven there."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from pe_onnx import __version__, contract
from pe_onnx.bundle import FORMAT, MODEL, WEIGHTS, Bundle, read_bundle, sha256, write_bundle
from pe_onnx.errors import needs

with needs("export", "'pe-onnx[export]'"):
    import onnx
    import onnx_ir as ir
    from torch import nn

from pe_onnx.models.exportable import Exportable
from pe_onnx.tracing import Progress

EMBED_BELOW_BYTES = 1 << 20
"""Weights smaller than this stand in model.onnx itself."""

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers")


def write(
    model: ir.Model,
    exportable: Exportable,
    output: Path,
    target: str,
    dtype: str,
    logits: str,
    force: bool,
    verify: bool,
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
        manifest["proof"] = {"verified": False}
        if verify and exportable.proof is not None:
            progress("verify")
            for value in model.graph.initializers.values():
                value.const_value = None
            exportable.module = nn.Module()
            gc.collect()  # the place of the weights is onnxruntime's now
            from pe_onnx.verification import verify as run_proof  # needs onnxruntime

            manifest["proof"] = run_proof(Bundle(folder, manifest), exportable.proof)
    return read_bundle(output, verify=False)


def _add_metadata(path: Path, key: str, value: str) -> None:
    """To a model whose weights stand in another file, which is not touched."""
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, key: value})
    path.write_bytes(proto.SerializeToString())


def _manifest(model: ir.Model, e: Exportable, target: str, dtype: str, logits: str) -> dict[str, Any]:
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph)
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
            "vocab_size": e.vocab_size,
            "score_heads": max(map(_score_heads, model.graph), default=0),
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


def _score_heads(node: ir.Node) -> int:
    """H of a tensor [H, T, S] at fused attention: a bias, or the scores that a soft-cap or sinks have materialised."""
    if node.op_type != "CachedAttention":
        return 0
    fused = not any(node.inputs[7:]) and not node.attributes.get_float("softcap")
    return 0 if fused else node.attributes.get_int("num_heads")


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions
