"""The finished bundle in onnxruntime against the model it came from, before it is moved into its place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pe_onnx import position_channels
from pe_onnx.bundle import CUDA, ENCODER, RUNTIME, WEIGHTS, Bundle
from pe_onnx.errors import ExportError
from pe_onnx.external_weights import load
from pe_onnx.models.attention import LayerCache
from pe_onnx.models.proof import Feed, Proof
from pe_onnx.models.seq2seq_proof import Seq2SeqProof
from pe_onnx.passes.widened import Widened
from pe_onnx.session import Session
from pe_onnx.tolerance import LEAN, PROOF, PROOF_OF_BF16, tolerance_for


def verify(bundle: Bundle, proof: Proof | Seq2SeqProof) -> dict[str, Any]:
    """The manifest's entry: the greatest error of a logit, of the logits' spread, and what is allowed.

    Raises ExportError where the bundle exceeds it, BundleError where onnxruntime cannot load or run it.
    """
    dtype = bundle.manifest["dtype"]
    allowed = (PROOF_OF_BF16 if dtype == "bf16" else 1) * PROOF * tolerance_for(dtype, bundle.depth).error
    with runnable(bundle) as other:
        error = _error(other, proof)
    if not error <= allowed:
        raise ExportError(
            f"the exported graph does not compute what PyTorch computes: on {proof.description} its logits are off by "
            f"{error:.1e} of their spread, {dtype} allows {allowed:.1e}; nothing was written"
        )
    return {"verified": True, "on": proof.description, "relative_error": float(f"{error:.2e}"), "allowed": allowed}


@contextmanager
def runnable(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, or for a while one that the CPU has kernels for: of bfloat16 the same graphs over the same weights in
    float32."""
    if bundle.manifest["dtype"] != "bf16":
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix=".wide-", dir=bundle.folder.parent) as place:
        for path in sorted(bundle.folder.glob("*.onnx")):
            model = load(path)
            Widened()(model)
            external = f"{path.name}.data" if (bundle.folder / WEIGHTS).exists() else None
            ir.save(model, Path(place, path.name), external_data=external)
        yield Bundle(Path(place), {**bundle.manifest, "dtype": "fp32"})


def _error(bundle: Bundle, proof: Proof | Seq2SeqProof) -> float:
    """The greatest of a logit, of the spread of the proof's."""
    options = (bundle.manifest["target"], bundle.caches, getattr(torch, bundle.dtype))
    if isinstance(proof, Seq2SeqProof):
        encoder, decoder = (Session(bundle, options=LEAN, graph=name) for name in (ENCODER, bundle.model.name))

        def encode(*sources: torch.Tensor) -> torch.Tensor:
            return _run(encoder, sources)[0]

        def decode(ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor, *others: Any) -> Any:
            later = others[-1][0][2].shape[2] > 0  # then the graph must not need the encoder's output
            return _cached(decoder, ids, mask, hidden[:, :0] if later else hidden, *others)

        return proof.error(encode, decode, *options)

    def error_of(graph: str) -> float:
        one = Session(bundle, options=LEAN, graph=graph)

        def run(feed: Feed, past: list[LayerCache]) -> tuple[torch.Tensor, list[LayerCache]]:
            return _cached(one, feed.input_ids, feed.attention_mask, feed.position_ids, _fitting(one, past))

        return proof.error(run, *options)

    graphs = [name for name in (bundle.model.name, RUNTIME, CUDA) if (bundle.folder / name).exists()]
    return max(map(error_of, graphs))


def _fitting(session: Session, past: list[LayerCache]) -> list[LayerCache]:
    """The caches, with the positions of their slots where the graph has them in keys and they do not."""
    bits = session.position_bits
    if bits is None or past[0][0].shape[-1] == session.caches[0][1]:
        return past

    def widened(x: torch.Tensor, positions: np.ndarray | None) -> torch.Tensor:
        return torch.from_numpy(position_channels.widened(x.numpy(), positions, bits, session.bundle.cache_dtype))

    return [(widened(key, np.arange(key.shape[2])), widened(value, None)) for key, value in past]


def _run(session: Session, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors in graph order to all outputs."""
    feeds = dict(zip(session.inputs, (x.numpy() for x in tensors), strict=True))
    return [torch.from_numpy(x) for x in session.evaluate(feeds)]


def _cached(session: Session, *feeds: Any) -> tuple[torch.Tensor, list[Any]]:
    """Tensors, last the caches of each layer, to logits and presents likewise."""
    *tensors, past = feeds
    logits, *flat = _run(session, [*tensors, *(x for layer in past for x in layer)])
    presents = iter(flat)
    return logits, [tuple(next(presents) for _ in layer) for layer in past]
