"""Attention that is not causal: an encoder's over its own source, and a decoder's over what the encoder made of it.

A layer reaches these through transformers' attention interface with a bidirectional mask (``models/interface.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from pe_onnx.custom_ops import cross_attention, encoder_attention, relative_band
from pe_onnx.errors import CheckpointError
from pe_onnx.models.attention import LayerCache


class Across(Protocol):
    """What bidirectional attention is computed by."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, scale: float, bias: torch.Tensor | None, *projected: torch.Tensor
    ) -> torch.Tensor:
        """``[B, H, T, D]`` to ``[B, T, H, D]``; projected: the layer's own keys and values, ``[B, H, S, D]``."""
        ...


class EncoderStep:
    """One pass over sources of any padding, int64 ``[B, S]`` in their mask; positions are slots, as in transformers."""

    def __init__(self, attention_mask: torch.Tensor) -> None:
        self.mask = attention_mask != 0

    def relative_bias(self, weight: torch.Tensor, max_distance: int) -> torch.Tensor:
        """What this step's attention takes as T5's bias, to be made once for all layers that share a table."""
        return relative_band(weight, max_distance)

    def attend(
        self, module: nn.Module, query: torch.Tensor, scale: float, bias: torch.Tensor | None, *projected: torch.Tensor
    ) -> torch.Tensor:
        if bias is None:
            raise CheckpointError(f"{type(module).__name__}: an encoder without a relative bias is not understood")
        H = query.shape[1]
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, *projected))  # [B, S, H*D]
        return encoder_attention(q, k, v, self.mask, bias, H, scale).unflatten(-1, (H, -1))


class CrossStep:
    """A decoder's run over the encoder's output, whose keys and values are computed where the past ones are empty."""

    def __init__(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor, past: Sequence[LayerCache]
    ) -> None:
        """``[B, S, C]``, int64 ``[B, S]``, and for each layer ``[B, H, E, D]`` twice, E = 0 or S."""
        self.hidden = encoder_hidden_states
        self.mask = encoder_attention_mask != 0
        self.past = past
        self.presents: list[LayerCache | None] = [None] * len(past)

    def attend(
        self, module: nn.Module, query: torch.Tensor, scale: float, bias: torch.Tensor | None, *projected: torch.Tensor
    ) -> torch.Tensor:
        """The layer's projected keys and values are not used, so that no run but the first computes them."""
        if getattr(module, "has_relative_attention_bias", True):
            raise CheckpointError(f"{type(module).__name__}: a relative bias across to the encoder is not understood")
        own: Any = module
        layer, H = own.layer_idx, query.shape[1]
        output, *present = cross_attention(
            query.transpose(1, 2).flatten(2),
            self.hidden,
            own.k.weight.T,
            own.v.weight.T,
            *self.past[layer],
            self.mask,
            H,
            scale,
        )
        self.presents[layer] = (present[0], present[1])
        return output.unflatten(-1, (H, -1))
