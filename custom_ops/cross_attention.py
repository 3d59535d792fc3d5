"""Attention of a decoder over the encoder's output, whose keys and values are made once a request.

Vaswani et al. 2017, section 3.2.3; the merged decoders of optimum, and transformers 5 `EncoderDecoderCache`::

    k, v = encoder_hidden_states key_weight, encoder_hidden_states value_weight    when past is empty: the first run
    k, v = past_key, past_value                                                    afterwards
    softmax(scale q k^T + mask) v

Afterwards the presents are empty and the caller keeps those of the first run: nothing is computed again, and nothing
is copied. In ONNX an If on the length of past, with the attention in its branches.
"""

from typing import Any

import torch
from onnxscript import BOOL, FLOAT, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(
    query: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, H, _, D), S = past_key.shape, encoder_hidden_states.shape[1]
    return query.new_empty(query.shape), past_key.new_empty(B, H, S, D), past_value.new_empty(B, H, S, D)


@script(PE_ONNX, default_opset=opset23)
def CrossAttention(
    query: FLOAT,
    encoder_hidden_states: FLOAT,
    key_weight: FLOAT,
    value_weight: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    mask: BOOL,
    num_heads: int,
    scale: float,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    zero = opset23.Constant(value_ints=[0])
    one = opset23.Constant(value_ints=[1])
    length_axis = opset23.Constant(value_ints=[2])
    head_axes = opset23.Constant(value_ints=[1, 2])
    leave = opset23.Constant(value_ints=[0, 0])
    rest = opset23.Constant(value_ints=[-1])
    H = opset23.Unsqueeze(opset23.Constant(value_int=num_heads), zero)
    by_head = opset23.Concat(leave, H, rest, axis=0)
    q = opset23.Transpose(opset23.Reshape(query, by_head), perm=[0, 2, 1, 3])  # [B, H, T, D]
    # onnxruntime broadcasts a mask over batch and heads, not over queries
    T = opset23.Shape(query, start=1, end=2)
    seen = opset23.Expand(opset23.Unsqueeze(mask, head_axes), opset23.Concat(one, one, T, one, axis=0))
    if opset23.Shape(past_key, start=2, end=3) == zero:
        key = opset23.MatMul(encoder_hidden_states, key_weight)
        value = opset23.MatMul(encoder_hidden_states, value_weight)
        present_key = opset23.Transpose(opset23.Reshape(key, by_head), perm=[0, 2, 1, 3])
        present_value = opset23.Transpose(opset23.Reshape(value, by_head), perm=[0, 2, 1, 3])
        output = opset23.Attention(q, present_key, present_value, seen, scale=scale)
    else:
        output = opset23.Attention(q, past_key, past_value, seen, scale=scale)
        present_key = opset23.Slice(past_key, zero, zero, length_axis)
        present_value = opset23.Slice(past_value, zero, zero, length_axis)
    packed = opset23.Reshape(opset23.Transpose(output, perm=[0, 2, 1, 3]), opset23.Concat(leave, rest, axis=0))
    return packed, present_key, present_value


def _translate(
    query, encoder_hidden_states, key_weight, value_weight, past_key, past_value, mask, num_heads: int, scale: float
):
    tensors = (query, encoder_hidden_states, key_weight, value_weight, past_key, past_value, mask)
    return CrossAttention(*tensors, num_heads=num_heads, scale=scale)


@operator(_fake, _translate)
def cross_attention(
    query: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    mask: torch.Tensor,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend to the source; make its keys and values first if past is empty.

    query: ``[B, T, H*D]``. encoder_hidden_states: ``[B, S, C]``, read on the first run alone; of length 0 afterwards.
    key_weight, value_weight: ``[C, H*D]``. past_key, past_value: ``[B, H, E, D]``, E = 0 on the first run, else S.
    mask: bool ``[B, S]``, True may be seen; at least one a row. Returns output ``[B, T, H*D]``, present_key and
    present_value: ``[B, H, S, D]`` on the first run, then ``[B, H, 0, D]``.
    """
    key, value = past_key, past_value
    if past_key.shape[2] == 0:
        key, value = (
            (encoder_hidden_states @ weight).unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
            for weight in (key_weight, value_weight)
        )  # [B, H, S, D]
        present_key, present_value = key, value
    else:
        present_key, present_value = key.new_empty(key[:, :, :0].shape), value.new_empty(value[:, :, :0].shape)
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
    scores = (scale * q @ key.mT).masked_fill(~mask[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).flatten(2), present_key, present_value
