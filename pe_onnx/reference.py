"""PyTorch's side of a parity check: eager, in float32, all tokens at once, no cache and none of the export's steps.

For our own decoder the encodings' operators are the same PyTorch formulas; these are held against independent ones in
``tests/test_custom_ops.py``. For a checkpoint nothing is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_onnx.errors import CheckpointError, needs

with needs("parity", "'pe-onnx[export]'"):
    import torch

if TYPE_CHECKING:
    from pe_onnx.parity import Reference


def from_manifest(manifest: Mapping[str, Any]) -> tuple[Reference, str]:
    """The reference that a bundle's manifest names. Raises CheckpointError where it is not to be had."""
    source = manifest["source"]
    if source["kind"] == "encoding":
        from pe_onnx.config import DecoderConfig
        from pe_onnx.models.decoder import Decoder
        from pe_onnx.models.exportable import PlainDecoder

        config = DecoderConfig.from_dict(source["config"])
        return from_module(PlainDecoder(Decoder(config))), f"PyTorch, {config.encoding} decoder, seed {config.seed}"
    if source["kind"] == "checkpoint":
        path = Path(source["path"])
        if not path.exists():
            raise CheckpointError(f"the bundle's checkpoint {path} is gone; name it with --reference")
        scaling = source.get("rope_scaling")
        return from_checkpoint(path, scaling), f"transformers, {path}{_scaled(scaling)}"
    raise CheckpointError(f"the bundle was exported from a module, {source['class']}; hand it in as the reference")


def from_checkpoint(path: Path, scaling: Mapping[str, Any] | None = None) -> Reference:
    """transformers' own model with its own eager attention. scaling: what the bundle was exported with."""
    from pe_onnx.exporter import silenced

    with needs("a checkpoint", "'pe-onnx[export]'"):
        from pe_onnx.models.checkpoint import load_model, resolve

    with silenced():
        model = load_model(path, config=resolve(path, scaling)[0] if scaling else None)
    return from_module(lambda ids, mask, positions: model(input_ids=ids, attention_mask=mask, position_ids=positions))


def _scaled(scaling: Mapping[str, Any] | None) -> str:
    return " with " + ", ".join(f"{key} {value}" for key, value in scaling.items()) if scaling else ""


def from_module(module: Any) -> Reference:
    """``module(input_ids, attention_mask, position_ids)`` to logits ``[B, T, V]``, or an output that has them."""

    @torch.no_grad()
    def compute(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tokens = torch.from_numpy(ids)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        output = module(tokens, torch.ones_like(tokens), positions)
        return getattr(output, "logits", output).float().numpy()

    return compute


def is_module(value: object) -> bool:
    return isinstance(value, torch.nn.Module)
