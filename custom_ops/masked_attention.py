"""Attention over a growing cache with an explicit mask: the operator of the ``portable`` target.

Vaswani et al. 2017, equation 1, with grouped heads; the standard Attention-23 in ONNX, never with ``is_causal``,
on which execution providers disagree when there is a past::

    softmax(softcap(scale q k^T) + mask) v        softcap(x) = c tanh(x / c), or x for c = 0
"""

from typing import Any

import torch
from onnxscript import FLOAT, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, T, _), (_, K, P, D) = query.shape, past_key.shape
    return (
        query.new_empty(query.shape),
        past_key.new_empty(B, K, P + T, D),
        past_value.new_empty(B, K, P + T, D),
    )


@script(PE_ONNX, default_opset=opset23)
def MaskedAttention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    mask: FLOAT,
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    output, present_key, present_value = opset23.Attention(
        query,
        key,
        value,
        mask,
        past_key,
        past_value,
        q_num_heads=num_heads,
        kv_num_heads=kv_heads,
        scale=scale,
        softcap=softcap,
    )
    return output, present_key, present_value


@operator(_fake, MaskedAttention)
def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    mask: torch.Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append the new keys and values to the cache and attend.

    query: ``[B, T, H*D]``. key, value: ``[B, T, K*D]``. past_key, past_value: ``[B, K, P, D]``.
    mask: ``[B, 1 or H, T, S]``, S = P + T: bool (True may be seen), or added to the scores. No row may be all masked.
    Returns output ``[B, T, H*D]``, present_key and present_value ``[B, K, S, D]``.
    """
    group = num_heads // kv_heads
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
    present_key = torch.cat((past_key, key.unflatten(-1, (kv_heads, -1)).transpose(1, 2)), 2)  # [B, K, S, D]
    present_value = torch.cat((past_value, value.unflatten(-1, (kv_heads, -1)).transpose(1, 2)), 2)
    scores = scale * q @ present_key.repeat_interleave(group, 1).mT  # [B, H, T, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    output = weights @ present_value.repeat_interleave(group, 1)  # [B, H, T, D]
    return output.transpose(1, 2).flatten(2), present_key, present_value
