"""An encoding by its name, with its weights drawn, and positions far from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pe_onnx import discovery
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding, build_encoding

ENCODINGS = discovery.names("encodings")
FAR = torch.tensor([[0, 1, 2, 63, 1000, 2047, 65_536, 99_991, 131_071, 1_000_000]])


def encoding(name: str, config: dict[str, Any] | None = None, **parameters: Any) -> PositionalEncoding:
    """With its weights, if it has any, drawn."""
    made = build_encoding(DecoderConfig(encoding=name, encoding_parameters=parameters, **(config or {})))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made
