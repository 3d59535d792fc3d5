"""Quantization: a bundle to one whose weights have 8 or 4 bits, streamed, and proven before it is put in its place.

The proof keeps two questions apart. Whether the new bundle computes what the old one computes *with the rounded
weights* is a question of right or wrong: the old graphs are run with the rounded weights written out, in whole and
cached runs, and the logits compared. What the rounding itself costs is a question of quality: ``pe-onnx check`` answers
it with KL divergence and bits per byte against PyTorch.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pe_onnx import block_quantization as blocks
from pe_onnx.bundle import (
    CUDA,
    ENCODER,
    MANIFEST,
    PROMPT,
    RUNTIME,
    WEIGHTS,
    Bundle,
    check_output,
    read_bundle,
    write_bundle,
)
from pe_onnx.errors import ConfigError, ExportError, first_line, needs

with needs("quantization", "'pe-onnx[export]'"):
    import onnx_ir as ir

from pe_onnx.external_weights import load
from pe_onnx.passes.nodes import attribute
from pe_onnx.passes.quantized_cache import QuantizedCache
from pe_onnx.passes.quantized_weights import QuantizedWeights, Rounding, rounded_weights
from pe_onnx.tolerance import LEAN, PROOF, tolerance_for, tolerance_of
from pe_onnx.tracing import Progress
from pe_onnx.writing import EMBED_BELOW_BYTES, described, save, write_runtime

ACCURACY_LEVEL = 4
"""Of MatMulNBits: 4 rounds activations to int8, in blocks, and multiplies integers; 1 multiplies in float32.

A decode step of SmolLM2-135M takes a quarter of the time with 4, a prompt of 256 tokens three quarters with 1: prompts
have a graph of their own over the same weights.
"""

HEAD_BITS = 8
"""Of the token embedding and the head, where nobody says: at 4 they add half to the KL divergence of SmolLM2-135M."""

BLOCK = 32
"""Weights that share a scale, where nobody says."""

PROOF_ROWS = (24, 17)
"""Tokens of the proof's prompts, and ``PROOF_STEPS`` steps on each."""
PROOF_STEPS = 6
PROOF_ON = f"{sum(PROOF_ROWS)} tokens and {PROOF_STEPS} steps, with the rounded weights"


def quantize(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    bits: int | None = 4,
    block: int | None = None,
    symmetric: bool = True,
    head_bits: int | None = None,
    exclude: Sequence[str] = (),
    accuracy_level: int | None = None,
    cache: str | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Round the weights of a bundle, its cache or both, write it to the folder ``output`` and return it.

    bits: 4 or 8; None leaves weights as they are. block: weights of a row that share a scale, 16 to 256; it must divide
    every row. Default 32, or 16 where 32 does not divide. symmetric: integers around 0; otherwise each block has a zero
    point too. head_bits: of the token embedding and the head, 4 or 8; default 8. exclude: patterns (``*.lm_head.*``) of
    weights that keep their precision. accuracy_level: onnxruntime's, 1 for activations in float32, 4 for int8; default
    4. cache: ``int8`` for keys and values of target ``ort``, with a scale for each channel, calibrated on a text.
    verify: run the new bundle against the old one with the rounded weights. Raises ConfigError for options that are
    none, and a bundle that is quantized already, or in bfloat16; ExportError where the proof fails; then nothing is
    written.
    """
    if bits not in (None, *blocks.BITS):
        raise ConfigError(f"bits = {bits} must be one of {', '.join(map(str, blocks.BITS))}")
    if block not in (None, *blocks.BLOCKS):
        raise ConfigError(f"block = {block} must be one of {', '.join(map(str, blocks.BLOCKS))}")
    if head_bits not in (None, *blocks.BITS):
        raise ConfigError(f"head_bits = {head_bits} must be one of {', '.join(map(str, blocks.BITS))}")
    if accuracy_level not in (None, 1, 4):
        raise ConfigError(f"accuracy_level = {accuracy_level} must be 1 or 4")
    if cache not in (None, "int8"):
        raise ConfigError(f"cache = {cache!r} must be int8")
    if bits is None and cache is None:
        raise ConfigError("nothing is left to be rounded: give bits, or cache = 'int8'")
    source = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if source.quantization is not None:
        raise ConfigError(f"bundle {source.folder} is quantized already; quantize the one it was made from")
    if source.manifest["dtype"] == "bf16":
        raise ConfigError(
            f"bundle {source.folder} is in bf16, which no CPU runs: its rounding could not be proven; quantize one in "
            f"fp16 or fp32"
        )
    if cache is not None and (source.target != "ort" or source.crossing is not None):
        raise ConfigError(f"cache = {cache!r} is for decoders of target 'ort', whose attention can read it")
    check_output(Path(output), force)

    progress("load")
    models = {
        path.name: load(path) for path in sorted(source.folder.glob("*.onnx")) if path.name not in (RUNTIME, CUDA)
    }
    held: dict[str, Any] = {"bits": None, "accuracy_level": None}
    if bits is not None:
        level = ACCURACY_LEVEL if accuracy_level is None else accuracy_level
        rounding = Rounding(bits, block or BLOCK, symmetric, level)
        smaller, vocab_size = (16,) if block is None else (), source.shape["vocab_size"]
        weights = QuantizedWeights(rounding, tuple(exclude), smaller, (vocab_size, head_bits or HEAD_BITS))
        held = _round(models, source, weights)
    manifest = copy.deepcopy(dict(source.manifest))
    manifest["graph"] = described({name: models[name] for name in source.graphs})
    manifest["proof"] = {"verified": False}
    manifest["quantization"] = held
    progress("write")
    with write_bundle(output, manifest, force) as folder:
        try:
            save(models, folder, embedded=manifest["graph"]["weight_bytes"] < EMBED_BELOW_BYTES)
        except ValueError as error:  # onnx-ir reads no link out of the folder
            raise ExportError(f"the weights of {source.folder} cannot be read: {first_line(error)}") from error
        _copy_assets(source, folder)
        manifest["model"].pop("cuda_position_bits", None)
        if cache is None:
            manifest["model"] |= write_runtime(folder)
        made = Bundle(folder, manifest)
        if verify:
            progress("verify")
            want = _wanted(source, made)
            manifest["proof"] = _prove(source, made, want)
        if cache is not None:
            from pe_onnx.calibration import scales_of

            scales = scales_of(source)
            for path in sorted(folder.glob("*.onnx")):
                model = ir.load(path)
                QuantizedCache(scales)(model)
                ir.save(model, path)
                if path.name in source.graphs:
                    manifest["graph"] |= {"operators": described({path.name: model})["operators"]}
            held["cache"] = cache
            if verify:
                off = _allowed("with keys and values in int8", made, _logits(made), want)
                manifest["proof"] |= {"relative_error_of_cache": off}
    return read_bundle(output, verify=False)


def _round(models: dict[str, ir.Model], source: Bundle, weights: QuantizedWeights) -> dict[str, Any]:
    """Round the weights of a bundle's graphs, add the graph for prompts, and return the manifest's entry."""
    rounding, vocab_size = weights.rounding, source.shape["vocab_size"]
    if rounding.accuracy_level == 4 and source.crossing is None:  # many rows at once are multiplied quicker in float
        models[PROMPT] = models[source.model.name].clone()
    for name, model in models.items():
        weights(model)
        _drop_unread(model)
        for node in model.graph if name in (PROMPT, ENCODER) else ():
            one_row = source.logits == "last" and attribute(node, "N", 0) == vocab_size
            if node.op_type == "MatMulNBits" and not one_row:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        model.metadata_props["pe_onnx.quantization"] = f"int{rounding.bits}, blocks of {rounding.block}"
    weights.finish()
    scale_bits, stored = 8 * np.dtype(source.dtype).itemsize, weights.rounded.values()
    bits = sum(
        made.N
        * made.K
        * blocks.bits_per_weight(made.rounding.bits, made.rounding.block, rounding.symmetric, scale_bits)
        for made in stored
    )
    return {
        "bits": rounding.bits,
        "head_bits": weights.head and weights.head[1],
        "block": rounding.block,
        "symmetric": rounding.symmetric,
        "accuracy_level": rounding.accuracy_level,
        "bits_per_weight": round(bits / sum(made.N * made.K for made in stored), 3),
        "weights": len(weights.rounded),
        "kept": sorted(weights.kept),
    }


def _copy_assets(source: Bundle, folder: Path) -> None:
    """The bundle's other files: configuration and tokenizer."""
    for name in source.manifest["files"]:
        if not name.endswith(".onnx") and name not in (MANIFEST, WEIGHTS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)


def _drop_unread(model: ir.Model) -> None:
    """Weights that no node reads any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _wanted(source: Bundle, rounded: Bundle) -> Any:
    """What the source gives with the weights that ``rounded`` has."""
    if rounded.quantization is None or rounded.quantization["bits"] is None:
        return _logits(source)
    with with_rounded_weights(source, rounded) as twin:
        return _logits(twin, LEAN)


def _prove(source: Bundle, rounded: Bundle, want: Any) -> dict[str, Any]:
    """The manifest's entry. want: of ``_wanted``. Raises ExportError where the two bundles are not one function.

    Without prepacked weights onnxruntime writes them out and multiplies in float: then the two must agree as two float
    graphs do. The kernels that users run, which may round activations, are measured behind that.
    """
    proof: dict[str, Any] = {"verified": True, "on": PROOF_ON}
    if rounded.quantization is None or rounded.quantization["bits"] is None:
        return proof | {"relative_error": 0.0, "allowed": 0.0}
    error = _off(_logits(rounded, LEAN, rounded.model.name), want)
    allowed = PROOF * tolerance_for(source.manifest["dtype"], source.depth).error
    if not error <= allowed:
        raise ExportError(
            f"the quantized bundle does not compute what {source.folder} computes with the rounded weights: its logits "
            f"are off by {error:.1e} of their spread, allowed are {allowed:.1e}; nothing was written"
        )
    kernels = _allowed("with onnxruntime's kernels for few bits", rounded, _logits(rounded), want)
    proof |= {"relative_error": float(f"{error:.2e}"), "allowed": allowed}
    for name in (PROMPT, RUNTIME, CUDA):
        if (rounded.folder / name).exists() and not (error := _off(_logits(rounded, LEAN, name), want)) <= allowed:
            raise ExportError(
                f"{name} is off by {error:.1e} of the logits' spread, allowed are {allowed:.1e}; nothing was written"
            )
    return proof | {"relative_error_of_kernels": kernels}


def _allowed(what: str, bundle: Bundle, have: Any, want: Any) -> float:
    """The root mean square of the difference, relative to the spread. Raises ExportError where it is too great."""
    error, allowed = float(np.sqrt(np.square(have - want).mean()) / want.std()), tolerance_of(bundle).error
    if not error <= allowed:
        raise ExportError(
            f"{what} logits are off by {error:.1e} of their spread, allowed are {allowed:.1e}; nothing was written"
        )
    return float(f"{error:.2e}")


def _off(have: Any, want: Any) -> float:
    return float(np.abs(have - want).max() / want.std())


@contextmanager
def with_rounded_weights(source: Bundle, rounded: Bundle) -> Iterator[Bundle]:
    """The bundle ``source`` in a folder for a while, with the weights that ``rounded`` computes with."""
    weights: dict[str, Any] = {}
    for name in source.graphs:
        weights.update(rounded_weights(load(rounded.folder / name)))
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=rounded.folder.parent) as place:
        models = {name: load(source.folder / name) for name in source.graphs}
        for model in models.values():
            for name, value in model.graph.initializers.items():
                if name in weights and value.const_value is not None:
                    value.const_value = _written_out(value.const_value, weights[name])
        save(models, Path(place), embedded=not (source.folder / WEIGHTS).exists())
        yield Bundle(Path(place), source.manifest)


def _written_out(tensor: Any, make: Any) -> ir.LazyTensor:
    """Rounded weights in the place of ``tensor``, in its shape, orientation and dtype."""
    shape = tensor.shape.numpy()

    def read() -> Any:
        values = make()
        if values.shape != tuple(shape) or (shape[0] == shape[1] and _turned(tensor, values)):
            values = values.T
        return ir.tensor(np.ascontiguousarray(values, tensor.dtype.numpy()), name=tensor.name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(shape), name=tensor.name)


def _turned(tensor: Any, values: Any) -> bool:
    """Of a square matrix: whether it is stored the other way."""
    held = tensor.numpy()
    return float(np.abs(held - values).sum()) > float(np.abs(held - values.T).sum())


def _logits(bundle: Bundle, options: Mapping[str, str] | None = None, graph: str | None = None) -> Any:
    """float32 ``[runs, V]`` of ragged prompts and steps behind them."""
    from pe_onnx.kv_cache import make_cache
    from pe_onnx.session import Session
    from pe_onnx.sources import Sources

    rng = np.random.default_rng(0)
    session, vocab_size = Session(bundle, options=options, graph=graph), bundle.shape["vocab_size"]
    limit = bundle.max_length or PROOF_ROWS[0] + PROOF_STEPS
    steps = min(PROOF_STEPS, max(limit - 1, 0))
    rows = [rng.integers(0, vocab_size, min(n, limit - steps)).tolist() for n in PROOF_ROWS]
    sources = None
    if bundle.crossing is not None:
        sources = Sources(Session(bundle, options=options, graph=ENCODER), session, rows)
    cache = make_cache(session, len(rows), max(map(len, rows)) + steps, sources=sources)
    made = [np.stack(cache.prefill(rows))]
    for _ in range(steps):
        made.append(cache.decode(rng.integers(0, vocab_size, len(rows))).copy())
    return np.concatenate(made)
