"""Self-attention of an encoder under a bias of the distance, a chunk of queries at a time.

Raffel et al. 2020, section 2.1; transformers 5 `T5Attention` of an encoder::

    softmax(scale q k^T + bias + mask) v        bias[h, i, j] = band[0, h, 0, clip(j - i, -m, m) + m]

In ONNX a Loop over chunks of at most R queries, whose bias is a slice of the band, repeated beyond its edges: memory
grows with the length of the source and not with its square. A source of one chunk takes no Loop.
"""

from typing import Any

import torch
from onnxscript import BOOL, FLOAT, INT64, graph, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


@script(PE_ONNX, default_opset=opset23)
def EncoderAttention(
    query: FLOAT, key: FLOAT, value: FLOAT, mask: BOOL, band: FLOAT, num_heads: int, scale: float
) -> FLOAT:
    zero = opset23.Constant(value_ints=[0])
    one = opset23.Constant(value_ints=[1])
    before = opset23.Constant(value_ints=[0, 0, 0])  # of a Pad's axes, all but the last
    rows_and_columns = opset23.Constant(value_ints=[2, 3])
    S = opset23.Shape(query, start=1, end=2)
    R = opset23.Shape(band, start=2, end=3)
    W = opset23.Shape(band, start=3, end=4)
    m = (W - R) / opset23.Constant(value_ints=[2])
    lowest = opset23.Constant(value_float=float("-inf"))
    hidden = opset23.CastLike(opset23.Where(mask, 0.0, lowest), query)
    unseen = opset23.Unsqueeze(hidden, opset23.Constant(value_ints=[1, 2]))  # [B, 1, 1, S]
    if S <= R:
        bias = opset23.Slice(band, opset23.Concat(zero, m, axis=0), opset23.Concat(S, m + S, axis=0), rows_and_columns)
        output = opset23.Attention(
            query, key, value, bias + unseen, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale
        )
    else:
        count = (S + R - one) / R
        rows = (S + count - one) / count  # of each chunk: even, so that less than `count` queries are made up
        queries = opset23.Pad(query, opset23.Concat(before, zero, count * rows - S, zero, axis=0))

        @graph()
        def attend(i: INT64, condition: BOOL):
            start = i * rows
            first = m - start  # column of key 0
            near = opset23.Slice(
                band,
                opset23.Concat(zero, opset23.Max(first, zero), axis=0),
                opset23.Concat(rows, opset23.Min(first + S, W), axis=0),
                rows_and_columns,
            )
            left = opset23.Max(start - m, zero)
            right = opset23.Max(first + S - W, zero)
            bias = opset23.Pad(
                near, opset23.Concat(before, left, before, right, axis=0), mode="edge"
            )  # [1, H, rows, S]
            chunk = opset23.Attention(
                opset23.Slice(queries, start, start + rows, one),
                key,
                value,
                bias + unseen,
                q_num_heads=num_heads,
                kv_num_heads=num_heads,
                scale=scale,
            )
            by_row = opset23.Transpose(chunk, perm=[1, 0, 2])  # [rows, B, H*D]
            again = opset23.Identity(condition)
            return again, by_row

        chunks = opset23.Loop(opset23.Squeeze(count), opset23.Squeeze(S > R), body=attend)  # [count, rows, B, H*D]
        B_and_width = opset23.Concat(opset23.Shape(query, start=0, end=1), opset23.Shape(query, start=2), axis=0)
        rows_first = opset23.Reshape(chunks, opset23.Concat(count * rows, B_and_width, axis=0))
        output = opset23.Transpose(opset23.Slice(rows_first, zero, S, zero), perm=[1, 0, 2])
    return output


def _translate(query, key, value, mask, band, num_heads: int, scale: float):
    return EncoderAttention(query, key, value, mask, band, num_heads=num_heads, scale=scale)


@operator(_fake, _translate)
def encoder_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    band: torch.Tensor,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """Attend to every key that the mask shows, on both sides.

    query, key, value: ``[B, S, H*D]``. mask: bool ``[B, S]``, True may be seen; at least one a row. band: ``[1, H, R,
    R + 2m]`` as `relative_band` makes it. Returns ``[B, S, H*D]``; rows of output at padding are unspecified.
    """
    S, m = query.shape[1], (band.shape[3] - band.shape[2]) // 2
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
    at = torch.arange(S, device=query.device)
    bias = band[:, :, 0, (at - at[:, None]).clamp(-m, m) + m]  # [1, H, S, S]
    scores = (scale * q @ k.mT + bias).masked_fill(~mask[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)
