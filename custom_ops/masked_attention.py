"""Attention over a growing cache with an explicit mask: the operator of the ``portable`` target.

Vaswani et al. 2017, equation 1, with grouped heads; the standard Attention-23 in ONNX, never with ``is_causal``,
on which execution providers disagree when there is a past::

    softmax(softcap(scale q k^T) + mask) v        softcap(x) = c tanh(x / c), or x for c = 0
"""

from typing import Any

import onnx_ir
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


@script(PE_ONNX, default_opset=opset23)
def MaskedSinkAttention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    mask: FLOAT,
    sinks: FLOAT,
    scale: float,
    softcap: float = 0.0,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """mask: added to the scores. A sink is the score of one more key, in front of the others, whose value is 0."""
    leave = opset23.Constant(value_ints=[0, 0])
    rest = opset23.Constant(value_ints=[-1])
    one = opset23.Constant(value_ints=[1])
    H = opset23.Shape(sinks)
    kv_shape = opset23.Concat(leave, opset23.Shape(past_key, start=1, end=2), rest, axis=0)
    q = opset23.Transpose(opset23.Reshape(query, opset23.Concat(leave, H, rest, axis=0)), perm=[0, 2, 1, 3])
    k = opset23.Transpose(opset23.Reshape(key, kv_shape), perm=[0, 2, 1, 3])
    v = opset23.Transpose(opset23.Reshape(value, kv_shape), perm=[0, 2, 1, 3])
    present_key = opset23.Concat(past_key, k, axis=2)
    present_value = opset23.Concat(past_value, v, axis=2)
    slot = opset23.Concat(opset23.Shape(k, start=0, end=2), one, opset23.Shape(k, start=3, end=4), axis=0)
    zeros = opset23.CastLike(opset23.ConstantOfShape(slot), key)  # [B, K, 1, D]
    B, T = opset23.Shape(query, start=0, end=1), opset23.Shape(query, start=1, end=2)
    column = opset23.Expand(
        opset23.Unsqueeze(sinks, opset23.Constant(value_ints=[0, 2, 3])), opset23.Concat(B, H, T, one, axis=0)
    )
    every_head = opset23.Expand(mask, opset23.Concat(B, H, one, one, axis=0))
    output = opset23.Attention(
        q,
        opset23.Concat(zeros, present_key, axis=2),
        opset23.Concat(zeros, present_value, axis=2),
        opset23.Concat(column, every_head, axis=3),
        scale=scale,
        softcap=softcap,
    )  # [B, H, T, D]
    packed = opset23.Reshape(opset23.Transpose(output, perm=[0, 2, 1, 3]), opset23.Concat(leave, rest, axis=0))
    return packed, present_key, present_value


def _translate(
    query,
    key,
    value,
    past_key,
    past_value,
    mask,
    num_heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    sinks=None,
):
    tensors = (query, key, value, past_key, past_value)
    if sinks is None:
        return MaskedAttention(*tensors, mask, num_heads=num_heads, kv_heads=kv_heads, scale=scale, softcap=softcap)
    if mask.dtype == onnx_ir.DataType.BOOL:
        mask = opset23.CastLike(opset23.Where(mask, 0.0, float("-inf")), query)
    return MaskedSinkAttention(*tensors, mask, sinks, scale=scale, softcap=softcap)


@operator(_fake, _translate)
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
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append the new keys and values to the cache and attend.

    query: ``[B, T, H*D]``. key, value: ``[B, T, K*D]``. past_key, past_value: ``[B, K, P, D]``.
    mask: ``[B, 1 or H, T, S]``, S = P + T: bool (True may be seen), or added to the scores. No row may be all masked.
    sinks: None or ``[H]``, one more score in the softmax, without a value (gpt-oss).
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
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    S = present_key.shape[2]
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32))[..., :S].to(query.dtype)
    output = weights @ present_value.repeat_interleave(group, 1)  # [B, H, T, D]
    return output.transpose(1, 2).flatten(2), present_key, present_value
