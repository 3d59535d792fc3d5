"""T5's relative position bias: a learned number per head and per bucket of the distance.

Raffel et al. 2020, section 2.1; buckets as transformers 5 `T5Attention._relative_position_bucket` (causal) has them::

    d = max(query_position - key_position, 0)
    bucket(d) = d                                                        for d < n/2
              = min(n/2 + floor(log(2d/n) / log(2m/n) * n/2), n - 1)     otherwise
    bias[b, h, i, j] = weight[bucket(d), h]            n = number of buckets, m = max_distance
"""

import math
from typing import Any

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


def _general() -> Any:
    """Any positions: one gather for each pair of query and key."""

    @script(PE_ONNX, default_opset=opset23)
    def T5RelativeBias(weight: FLOAT, query_positions: INT64, key_positions: INT64, buckets: INT64) -> FLOAT:
        by_distance = opset23.Transpose(opset23.Gather(weight, buckets), perm=[1, 0])  # [H, N]
        zero = opset23.Constant(value_int=0)
        queries = opset23.Unsqueeze(query_positions, opset23.Constant(value_ints=[2]))  # [B, T, 1]
        keys = opset23.Unsqueeze(key_positions, opset23.Constant(value_ints=[1]))  # [B, 1, S]
        greatest = opset23.Size(buckets) - 1
        distance = opset23.Clip(queries - keys, zero, greatest)  # [B, T, S]
        bias = opset23.Gather(by_distance, distance, axis=1)  # [H, B, T, S]
        return opset23.Transpose(bias, perm=[1, 0, 2, 3])

    return T5RelativeBias


def _compact() -> Any:
    """Keys at 0, 1, 2, ...: for a step of one row a slice of the per-distance vector, otherwise one gather."""

    @script(PE_ONNX, default_opset=opset23)
    def T5RelativeBias(weight: FLOAT, query_positions: INT64, key_length: INT64, buckets: INT64) -> FLOAT:
        one = opset23.Constant(value_int=1)
        zero32 = opset23.Cast(0, to=6)
        farthest = opset23.Size(buckets) - 1
        by_distance = opset23.Transpose(opset23.Gather(weight, buckets), perm=[1, 0])  # [H, N], N = max_distance + 1
        reverse = opset23.Unsqueeze(
            opset23.Gather(by_distance, opset23.Range(farthest, -1, -1), axis=1), opset23.Constant(value_ints=[0, 2])
        )  # [1, H, 1, N]
        S = opset23.Squeeze(key_length)
        if opset23.Squeeze(opset23.Equal(opset23.Shape(query_positions, start=1, end=2), one)):
            if opset23.Squeeze(opset23.Equal(opset23.Shape(query_positions, start=0, end=1), one)):
                # distances S - 1 .. 0; a negative pad cuts the farthest off
                beyond = opset23.Reshape(S - farthest - 1, opset23.Constant(value_ints=[1]))
                zeros = opset23.Constant(value_ints=[0, 0, 0])
                zero = opset23.Constant(value_ints=[0])
                step = opset23.Pad(reverse, opset23.Concat(zeros, beyond, zeros, zero, axis=0), mode="edge")
            else:  # each row at its own length
                keys_s = opset23.Cast(opset23.Range(0, S, one), to=6)
                distance_s = opset23.Cast(query_positions, to=6) - keys_s  # [B, S]
                index_s = opset23.Clip(distance_s, zero32, opset23.Cast(farthest, to=6))
                gathered = opset23.Transpose(opset23.Gather(by_distance, index_s, axis=1), perm=[1, 0, 2])
                step = opset23.Unsqueeze(gathered, opset23.Constant(value_ints=[2]))  # [B, H, 1, S]
            bias = opset23.Identity(step)
        else:  # rows share their positions: one [H, T, S], made once and never copied
            keys = opset23.Cast(opset23.Range(0, S, one), to=6)
            queries = opset23.Gather(query_positions, opset23.Constant(value_int=0))  # [T]
            distance = opset23.Unsqueeze(opset23.Cast(queries, to=6), opset23.Constant(value_ints=[1])) - keys  # [T, S]
            index = opset23.Clip(distance, zero32, opset23.Cast(farthest, to=6))
            bias = opset23.Gather(opset23.Unsqueeze(by_distance, opset23.Constant(value_ints=[0])), index, axis=2)
        return bias  # [B or 1, H, T, S]

    return T5RelativeBias


T5RelativeBiasGeneral = _general()
T5RelativeBiasCompact = _compact()


def _translate(weight, query_positions, key_positions, key_length, max_distance: int = 128):
    buckets = bucket_of_distance(int(weight.shape[0]), max_distance)
    constant = opset23.Constant(value_ints=buckets.tolist())
    if key_positions is None:
        return T5RelativeBiasCompact(weight, query_positions, key_length, constant)
    return T5RelativeBiasGeneral(weight, query_positions, key_positions, constant)


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
    at 0 .. S-1 in every row. key_length: S. Returns ``[B, H, T, S]`` of the dtype of weight; a key after its query
    counts as distance 0. With key_positions None, the ONNX function takes T = 1, or query positions that all rows
    share; for these it returns ``[1, H, T, S]``. For T = B = 1 the query is the last key.
    """
    buckets = bucket_of_distance(weight.shape[0], max_distance).to(weight.device)
    if key_positions is None:
        key_positions = torch.arange(key_length, device=weight.device)[None]
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(0, max_distance)  # [B, T, S]
    return weight[buckets[distance]].permute(0, 3, 1, 2).contiguous()
