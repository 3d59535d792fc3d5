"""Quantization: a bundle to one whose weights have 8 or 4 bits, streamed, and proven before it is put in its place.

The proof keeps two questions apart. Whether the new bundle computes what the old one computes *with the rounded
weights* is a question of right or wrong: the old graphs are run with the rounded weights written out, in whole and
cached runs, and the logits compared. What the rounding itself costs is a question of quality: ``pe-onnx check`` answers
it with KL divergence and bits per byte against PyTorch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pe_onnx import block_quantization as blocks
from pe_onnx.bundle import ENCODER, MANIFEST, WEIGHTS, Bundle, check_output, link_or_copy, read_bundle, write_bundle
from pe_onnx.errors import ConfigError, ExportError, needs

with needs("quantization", "'pe-onnx[export]'"):
    import onnx_ir as ir

from pe_onnx.passes.quantized_weights import QuantizedWeights, Rounding, rounded_weights
from pe_onnx.tolerance import PROOF, tolerance_for, tolerance_of
from pe_onnx.tracing import Progress
from pe_onnx.writing import EMBED_BELOW_BYTES, described, save

ACCURACY_LEVELS = {4: 4, 8: 4}
"""Of MatMulNBits by bits: 4 rounds activations to int8 (``benchmarks/quantization.py``)."""

BLOCK = 32
"""Weights that share a scale, where nobody says."""

LEAN = {"session.disable_prepacking": "1"}
"""Of a session that runs a few times only: weights stay where they are mapped."""

PROOF_ROWS = (24, 17)
"""Tokens of the proof's prompts, and ``PROOF_STEPS`` steps on each."""
PROOF_STEPS = 6


def quantize(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    bits: int = 4,
    block: int | None = None,
    symmetric: bool = True,
    exclude: Sequence[str] = (),
    accuracy_level: int | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Round the weights of a bundle and write it to the folder ``output``; return it.

    bits: 4 or 8. block: weights of a row that share a scale, 16 to 256; it must divide every row. Default 32,
    or 16 where 32 does not divide. symmetric: integers
    around 0; otherwise each block has a zero point too. exclude: patterns (``*.lm_head.*``) of weights that keep their
    precision. accuracy_level: onnxruntime's, 1 for activations in float32, 4 for int8; default 4. verify: run the new
    bundle against the old one with the rounded weights. Raises ConfigError for options that are none, and a bundle that
    is quantized already; ExportError where the proof fails; then nothing is written.
    """
    if bits not in blocks.BITS:
        raise ConfigError(f"bits = {bits} must be one of {', '.join(map(str, blocks.BITS))}")
    if block not in (None, *blocks.BLOCKS):
        raise ConfigError(f"block = {block} must be one of {', '.join(map(str, blocks.BLOCKS))}")
    if accuracy_level not in (None, 0, 1, 4):
        raise ConfigError(f"accuracy_level = {accuracy_level} must be 0, 1 or 4")
    source = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if source.quantization is not None:
        held = source.quantization["bits"]
        raise ConfigError(
            f"bundle {source.folder} is quantized to {held} bits already; quantize the one it was made from"
        )
    check_output(Path(output), force)
    level = ACCURACY_LEVELS[bits] if accuracy_level is None else accuracy_level
    smaller = (16,) if block is None else ()
    rounding = QuantizedWeights(Rounding(bits, block or BLOCK, symmetric, level), tuple(exclude), smaller)

    progress("load")
    files = sorted(path.name for path in source.folder.glob("*.onnx"))
    models = {name: ir.load(source.folder / name) for name in files}
    for model in models.values():
        rounding(model)
        _drop_unread(model)
    rounding.finish()

    manifest = copy.deepcopy(dict(source.manifest))
    manifest["graph"] = described({name: models[name] for name in source.graphs})
    manifest["quantization"] = {
        "bits": bits,
        "block": block or BLOCK,
        "symmetric": symmetric,
        "accuracy_level": level,
        "bits_per_weight": blocks.bits_per_weight(
            bits, block or BLOCK, symmetric, 8 * np.dtype(source.cache_dtype).itemsize
        ),
        "weights": len(rounding.rounded),
        "kept": sorted(rounding.kept),
    }
    manifest["proof"] = {"verified": False}
    for model in models.values():
        model.metadata_props["pe_onnx.quantization"] = f"int{bits}, blocks of {block or BLOCK}"
    progress("write")
    with write_bundle(output, manifest, force) as folder:
        save(models, folder, embedded=manifest["graph"]["weight_bytes"] < EMBED_BELOW_BYTES)
        for path in source.folder.rglob("*"):
            if (
                path.is_file()
                and path.suffix != ".onnx"
                and path.name not in (MANIFEST, WEIGHTS)
                and _kept(source, path)
            ):
                target = folder / path.relative_to(source.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
        if verify:
            progress("verify")
            manifest["proof"] = _prove(source, Bundle(folder, manifest))
    return read_bundle(output, verify=False)


def _kept(source: Bundle, path: Path) -> bool:
    """Whether a file is of the bundle, and not something that was put beside it."""
    return str(path.relative_to(source.folder)) in source.manifest["files"]


def _drop_unread(model: ir.Model) -> None:
    """Weights that no node reads any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _prove(source: Bundle, rounded: Bundle) -> dict[str, Any]:
    """The manifest's entry. Raises ExportError where the two bundles are not one function.

    Without prepacked weights onnxruntime writes them out and multiplies in float: then the two must agree as two float
    graphs do. The kernels that users run, which may round activations, are measured behind that.
    """
    with with_rounded_weights(source, rounded) as twin:
        want = _logits(twin, LEAN)
    error = _off(_logits(rounded, LEAN), want)
    allowed = PROOF * tolerance_for(source.manifest["dtype"], source.depth).error
    if not error <= allowed:
        raise ExportError(
            f"the quantized bundle does not compute what {source.folder} computes with the rounded weights: its logits "
            f"are off by {error:.1e} of their spread, allowed are {allowed:.1e}; nothing was written"
        )
    kernels, bound = float(np.sqrt(np.square(_logits(rounded) - want).mean()) / want.std()), tolerance_of(rounded).error
    if not kernels <= bound:
        raise ExportError(
            f"with onnxruntime's kernels for few bits logits are off by {kernels:.1e} of their spread, allowed are "
            f"{bound:.1e}; nothing was written"
        )
    return {
        "verified": True,
        "on": f"{sum(PROOF_ROWS)} tokens and {PROOF_STEPS} steps, with the rounded weights",
        "relative_error": float(f"{error:.2e}"),
        "allowed": allowed,
        "relative_error_of_kernels": float(f"{kernels:.2e}"),
    }


def _off(have: Any, want: Any) -> float:
    return float(np.abs(have - want).max() / want.std())


@contextmanager
def with_rounded_weights(source: Bundle, rounded: Bundle) -> Iterator[Bundle]:
    """The bundle ``source`` in a folder for a while, with the weights that ``rounded`` computes with."""
    weights: dict[str, Any] = {}
    for name in source.graphs:
        weights.update(rounded_weights(ir.load(rounded.folder / name)))
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=rounded.folder.parent) as place:
        models = {name: ir.load(source.folder / name) for name in source.graphs}
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


def _logits(bundle: Bundle, options: Mapping[str, str] | None = None) -> Any:
    """float32 ``[runs, V]`` of ragged prompts and steps behind them."""
    from pe_onnx.kv_cache import make_cache
    from pe_onnx.session import Session
    from pe_onnx.sources import Sources

    rng = np.random.default_rng(0)
    session, vocab_size = Session(bundle, options=options), bundle.shape["vocab_size"]
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
