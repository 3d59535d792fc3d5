"""T5's relative position bias: a learned number per head and per bucket of the distance.

Raffel et al. 2020, section 2.1; buckets as transformers 5 `T5Attention._relative_position_bucket` (causal) has them::

    d = max(query_position - key_position, 0)
    bucket(d) = d                                                        for d < n/2
              = min(n/2 + floor(log(2d/n) / log(2m/n) * n/2), n - 1)     otherwise
    bias[b, h, i, j] = weight[bucket(d), h]            n = number of buckets, m = max_distance
"""

import math

import torch
from onnxscript import FLOAT, INT64, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator
from pe_onnx.errors import ConfigError


def bucket_of_distance(num_buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of each distance 0 .. max_distance, int64 ``[max_distance + 1]``; greater distances share the last.

    The logarithm is float32, as in transformers: which side of a bucket's border a distance falls on depends on it.
    Raises ConfigError where the formula has no meaning.
    """
    exact = num_buckets // 2
    if num_buckets < 2 or max_distance <= exact:
        raise ConfigError(
            f"T5 bias: num_buckets = {num_buckets} must be at least 2 and max_distance = {max_distance} "
            f"greater than half of it"
        )
    distance = torch.arange(max_distance + 1)
    ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).to(torch.long)).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)


def _fake(
    weight: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor | None,
    key_length: int,
    max_distance: int = 128,
) -> torch.Tensor:
    (B, T), H = query_positions.shape, weight.shape[1]
    return weight.new_empty(B, H, T, key_length)


@script(PE_ONNX, default_opset=opset23)
def T5RelativeBias(
    weight: FLOAT, query_positions: INT64, key_positions: INT64, buckets: INT64, consecutive: int
) -> FLOAT:
    """consecutive: keys stand at 0 .. S - 1, so that the bias of one query is a slice of the per-distance vector."""
    one = opset23.Constant(value_int=1)
    axis0 = opset23.Constant(value_ints=[0])
    axis1 = opset23.Constant(value_ints=[1])
    by_distance = opset23.Transpose(opset23.Gather(weight, buckets), perm=[1, 0])  # [H, N], N = max_distance + 1
    farthest = opset23.Size(buckets) - 1
    reverse = opset23.Unsqueeze(
        opset23.Gather(by_distance, opset23.Range(farthest, -1, -1), axis=1), opset23.Constant(value_ints=[0, 2])
    )  # [1, H, 1, N]
    one_row = opset23.Squeeze(opset23.Equal(opset23.Shape(query_positions, start=0, end=1), one))
    is_slice = opset23.And(opset23.Cast(opset23.Constant(value_int=consecutive), to=9), one_row)
    if opset23.And(is_slice, opset23.Equal(opset23.Size(query_positions), one)):
        # distances q .. q - S + 1, those before 0 as 0; a negative pad cuts off what is too far, a positive one repeats
        q = opset23.Reshape(query_positions, opset23.Constant(value_ints=[1]))
        S = opset23.Shape(key_positions, start=1, end=2)
        zeros = opset23.Constant(value_ints=[0, 0, 0])
        pads = opset23.Concat(zeros, q - farthest, zeros, S - 1 - q, axis=0)
        bias = opset23.Pad(reverse, pads, mode="edge")  # [1, H, 1, S]
    else:
        queries = opset23.Unsqueeze(opset23.Cast(query_positions, to=6), opset23.Constant(value_ints=[2]))
        distance = queries - opset23.Unsqueeze(opset23.Cast(key_positions, to=6), axis1)  # [B, T, S]
        index = opset23.Clip(distance, opset23.Cast(0, to=6), opset23.Cast(farthest, to=6))
        if one_row:  # gathered into place: the one [T, S] matrix a head is never copied
            gathered = opset23.Gather(opset23.Unsqueeze(by_distance, axis0), opset23.Gather(index, 0), axis=2)
        else:
            gathered = opset23.Transpose(opset23.Gather(by_distance, index, axis=1), perm=[1, 0, 2, 3])
        bias = opset23.Identity(gathered)  # [B, H, T, S]
    return bias


def _translate(weight, query_positions, key_positions, key_length, max_distance: int = 128):
    buckets = opset23.Constant(value_ints=bucket_of_distance(int(weight.shape[0]), max_distance).tolist())
    consecutive = key_positions is None
    if consecutive:
        slots = opset23.Range(opset23.Constant(value_int=0), key_length, opset23.Constant(value_int=1))
        key_positions = opset23.Unsqueeze(slots, opset23.Constant(value_ints=[0]))
    return T5RelativeBias(weight, query_positions, key_positions, buckets, consecutive=int(consecutive))


@operator(_fake, _translate)
def t5_relative_bias(
    weight: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor | None,
    key_length: int,
    max_distance: int = 128,
) -> torch.Tensor:
    """The bias to add to the scores.

    weight: ``[num_buckets, H]``. query_positions: int64 ``[B, T]``. key_positions: int64 ``[B, S]``, or None for keys
    at 0 .. S-1 in every row, which makes a step of one row a slice. key_length: S. Returns ``[B, H, T, S]`` of the
    dtype of weight; a key after its query counts as distance 0.
    """
    buckets = bucket_of_distance(weight.shape[0], max_distance).to(weight.device)
    if key_positions is None:
        key_positions = torch.arange(key_length, device=weight.device)[None]
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(0, max_distance)  # [B, T, S]
    return weight[buckets[distance]].permute(0, 3, 1, 2).contiguous()
