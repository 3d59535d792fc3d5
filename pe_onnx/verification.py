"""The finished bundle in onnxruntime against the model it came from, before it is moved into its place."""

from __future__ import annotations

from typing import Any

import torch

from pe_onnx import contract
from pe_onnx.bundle import Bundle
from pe_onnx.errors import ExportError
from pe_onnx.models.attention import LayerCache
from pe_onnx.models.proof import Feed, Proof
from pe_onnx.session import Session
from pe_onnx.tolerance import PROOF, TOLERANCES


def verify(bundle: Bundle, proof: Proof) -> dict[str, Any]:
    """The manifest's entry: the greatest error of a logit, of the logits' spread, and what is allowed.

    Raises ExportError where the bundle exceeds it, BundleError where onnxruntime cannot load or run it.
    """
    session = Session(bundle)
    inputs = [*contract.TOKEN_INPUTS, *contract.past_names(len(bundle.caches))]

    def run(feed: Feed, past: list[LayerCache]) -> tuple[torch.Tensor, list[LayerCache]]:
        tensors = [feed.input_ids, feed.attention_mask, feed.position_ids, *(x for layer in past for x in layer)]
        outputs = session.evaluate(dict(zip(inputs, (x.numpy() for x in tensors), strict=True)))
        logits, *present = (torch.from_numpy(x) for x in outputs)
        return logits, list(zip(present[::2], present[1::2], strict=True))

    dtype = getattr(torch, contract.DTYPES[bundle.manifest["dtype"]])
    error = proof.error(run, bundle.manifest["target"], bundle.caches, dtype)
    allowed = PROOF * TOLERANCES[bundle.manifest["dtype"]].error
    if not error <= allowed:
        raise ExportError(
            f"the exported graph does not compute what PyTorch computes: on {proof.description} its logits are off by "
            f"{error:.1e} of their spread, {bundle.manifest['dtype']} allows {allowed:.0e}; nothing was written"
        )
    return {"verified": True, "on": proof.description, "relative_error": float(f"{error:.2e}"), "allowed": allowed}
