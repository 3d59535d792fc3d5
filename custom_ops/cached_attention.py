"""Attention over a cache of compact rows, updated in place: the operator of the ``ort`` target.

com.microsoft.GroupQueryAttention of onnxruntime. Row b holds its tokens in the slots 0 .. last_slots[b] and
nothing else: padding stands on the right. The new tokens of a row end there::

    start[b] = max(last_slots[b] + 1 - T, 0)    the first new token's slot and position
    query i sees key j  if  start[b] + i - window < j <= start[b] + i
    softmax(softcap(scale q k^T) + bias) v

A sink is one more score in the softmax, without a value (gpt-oss).

When past and present are one buffer, as our runtime binds them, nothing is copied.
"""

from typing import Any, Optional

import torch
from onnxscript import FLOAT, INT32, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX, GroupQueryAttention
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
def CachedAttention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    last_slots: INT32,
    total_length: INT32,
    bias: Optional[FLOAT],  # noqa: UP045 (onnxscript reads no other spelling)
    sinks: Optional[FLOAT],  # noqa: UP045
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = -1,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    output, present_key, present_value = GroupQueryAttention(
        query,
        key,
        value,
        past_key,
        past_value,
        last_slots,
        total_length,
        None,
        None,
        None,
        bias,
        sinks,
        num_heads=num_heads,
        kv_num_heads=kv_heads,
        scale=scale,
        softcap=softcap,
        local_window_size=window,
    )
    return output, present_key, present_value


def _translate(
    query,
    key,
    value,
    past_key,
    past_value,
    last_slots,
    total_length,
    bias,
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = -1,
    sinks=None,
):
    tensors = (query, key, value, past_key, past_value, last_slots, total_length, bias, sinks)
    return CachedAttention(
        *tensors, num_heads=num_heads, kv_heads=kv_heads, scale=scale, softcap=softcap, window=window
    )


@operator(_fake, _translate)
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    last_slots: torch.Tensor,
    total_length: torch.Tensor,
    bias: torch.Tensor | None,
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = -1,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the new keys and values into the rows of the cache and attend.

    query: ``[B, T, H*D]``. key, value: ``[B, T, K*D]``. past_key, past_value: ``[B, K, P, D]``, D a multiple of 16.
    last_slots: int32 ``[B]``, the slot of each row's last token. total_length: int32 ``[1]``, the greatest of them + 1.
    bias: None or ``[B or 1, H or 1, T, total_length]``, added to the scores. window: tokens seen, the query's own
    included; -1 for all. sinks: None or ``[H]``. Returns output ``[B, T, H*D]``, present_key and present_value
    ``[B, K, P + T, D]``; rows of output at padding are unspecified. In ONNX a call with T > 1 on a filled cache takes
    B = 1 only, and present has the length of past where that is the longer (a preallocated buffer).
    """
    (B, T, _), (_, K, P, D) = query.shape, past_key.shape
    group = num_heads // kv_heads
    start = (last_slots.long() + 1 - T).clamp(min=0)  # [B]
    slots = start[:, None] + torch.arange(T, device=query.device)  # [B, T]
    at = slots[:, None, :, None].expand(B, K, T, D)

    def append(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        room = torch.cat((past, past.new_zeros(B, K, T, D)), 2)  # [B, K, P + T, D]
        return room.scatter(2, at, new.unflatten(-1, (kv_heads, -1)).transpose(1, 2))

    present_key, present_value = append(past_key, key), append(past_value, value)
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
    scores = scale * q @ present_key.repeat_interleave(group, 1).mT  # [B, H, T, P + T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + torch.nn.functional.pad(bias, (0, P + T - bias.shape[-1]))
    distance = slots[:, :, None] - torch.arange(P + T, device=query.device)  # [B, T, P + T]
    seen = (distance >= 0) & ((distance < window) | (window < 0))
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(B, num_heads, T, 1)), -1)
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32))[..., : P + T].to(query.dtype)
    output = weights @ present_value.repeat_interleave(group, 1)  # [B, H, T, D]
    return output.transpose(1, 2).flatten(2), present_key, present_value
