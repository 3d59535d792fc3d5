"""Weights in half precision: those of the module that is exported, and of the one that it is proven against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pe_onnx import contract
from pe_onnx.errors import ConfigError


def halve(module: nn.Module, dtype: str) -> None:
    """Weights to ``fp16`` or ``bf16``, one at a time. Raises ConfigError for one that float16 cannot hold."""
    half = getattr(torch, contract.DTYPES[dtype])
    for name, parameter in _halved(module):
        greatest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if greatest > torch.finfo(half).max:
            raise ConfigError(f"dtype = {dtype!r} cannot hold {name}: its greatest weight is {greatest:.3g}; use fp32")
        parameter.data = parameter.data.to(half)


def round_weights(module: nn.Module, dtype: str) -> None:
    """To the numbers that they have in ``bf16``, in their own dtype: what a bundle whose proof is run in float32 can be
    held to closely. Of other dtypes nothing: float16's proof runs in float16, whose roundings are more than those of
    the weights. One at a time, and no copy of what is round already, as most checkpoints are."""
    if dtype != "bf16":
        return
    for _, parameter in _halved(module):
        rounded = parameter.data.bfloat16().to(parameter.dtype)
        if not torch.equal(rounded, parameter.data):
            parameter.data = rounded


def _halved(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Buffers keep their precision (inverse frequencies would be ruined), and so do modules that transformers keeps in
    float32 (T5's ``wo``, whose output overflows), but for norms."""
    kept = {name for m in module.modules() for name in getattr(m, "_keep_in_fp32_modules", None) or ()}
    kept = {f".{name}." for name in kept if "norm" not in name}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not any(part in f".{name}." for part in kept):
            yield name, parameter
