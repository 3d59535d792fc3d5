"""Rotation in a transformers model by our operator, where that is proven equal to the model's own function.

transformers writes ``apply_rotary_pos_emb`` anew in each modeling file: half-split, interleaved, with cosines repeated
in one layout or the other. Each reading is run against the file's own function on random input; the one that agrees
stands in for it during the export, and where none does the file's own function is exported as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from pe_onnx.custom_ops import rotary_embedding

FUNCTION = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _half_split(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # [B, T, R/2]
    return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)


def _interleaved(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos[..., ::2], sin[..., ::2]
    return rotary_embedding(q, cos, sin, 0, True), rotary_embedding(k, cos, sin, 0, True)


READINGS: dict[str, Rotate] = {"half-split": _half_split, "interleaved": _interleaved}


class Rotation:
    """A proven replacement; ``install`` and ``remove`` put it in the modeling file's place for the function."""

    def __init__(self, home: ModuleType, reading: str) -> None:
        self.home = home
        self.reading = reading
        self.original: Rotate = getattr(home, FUNCTION)

    def install(self) -> None:
        setattr(self.home, FUNCTION, READINGS[self.reading])

    def remove(self) -> None:
        setattr(self.home, FUNCTION, self.original)


@torch.no_grad()
def prove_rotation(model: PreTrainedModel) -> Rotation | None:
    """The reading that computes what the model's own function computes, or None."""
    home = sys.modules[type(model).__module__]
    original = getattr(home, FUNCTION, None)
    tables = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    if original is None or tables is None:
        return None
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    D = getattr(text, "head_dim", None) or text.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 5, D, generator=generator) for n in (heads, 1))
    positions = torch.tensor([[0, 1, 2, 3, 17], [4, 5, 6, 100, 1000]])
    try:
        cos, sin = tables(q, positions)
        expected = original(q, k, cos, sin)
    except Exception:  # another signature: not ours to replace
        return None
    for name, reading in READINGS.items():
        if cos.shape[-1] > D:
            continue
        pairs = zip(reading(q, k, cos, sin), expected, strict=True)
        if all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs):
            return Rotation(home, name)
    return None
