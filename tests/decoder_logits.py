"""Our decoder's logits by the reference step, and how far two results are apart."""

from __future__ import annotations

import numpy as np
import torch

from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

TOLERANCE = 5e-6
"""Of float32 logits, in units of their spread."""


def tokens(B: int, T: int, seed: int = 0, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed + 100 * T + B))


@torch.no_grad()
def plain(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor | None = None, shift: int = 0) -> torch.Tensor:
    """All logits by the reference step; positions count the mask's ones, from shift on."""
    mask = torch.ones_like(ids) if mask is None else mask
    return decoder(ids, (mask.cumsum(1) - 1).clamp(min=0) + shift, PlainStep(mask))


def off(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray) -> float:
    """The greatest difference in units of the logits' spread (max - min of a row, averaged)."""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    return float((got - want).abs().max() / (want.amax(-1) - want.amin(-1)).mean())


def empty(decoder: Decoder, B: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    c = decoder.config
    return [(torch.zeros(B, c.kv_heads, 0, c.head_size),) * 2 for _ in range(c.num_hidden_layers)]
