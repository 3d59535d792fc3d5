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


def _general() -> object:
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


def _compact() -> object:
    """Keys at 0, 1, 2, ...: a slice of the per-distance vector for a step, its skewed copy for a prompt."""

    @script(PE_ONNX, default_opset=opset23)
    def T5RelativeBias(weight: FLOAT, query_positions: INT64, key_length: INT64, buckets: INT64) -> FLOAT:
        by_distance = opset23.Transpose(opset23.Gather(weight, buckets), perm=[1, 0])  # [H, N], N = max_distance + 1
        zero = opset23.Constant(value_ints=[0])
        one = opset23.Constant(value_ints=[1])
        minus_one = opset23.Constant(value_ints=[-1])
        last = opset23.Constant(value_ints=[9223372036854775807])
        first = opset23.Constant(value_ints=[-9223372036854775807])
        S = opset23.Reshape(key_length, one)
        B = opset23.Shape(query_positions, start=0, end=1)
        T = opset23.Shape(query_positions, start=1, end=2)
        H = opset23.Shape(by_distance, start=0, end=1)
        N = opset23.Shape(by_distance, start=1, end=2)
        rows_differ = opset23.Squeeze(opset23.And(opset23.Greater(B, one), opset23.Equal(T, one)))
        if rows_differ:  # one step of several rows, each at its own length
            keys = opset23.Range(opset23.Squeeze(zero), opset23.Squeeze(S), opset23.Squeeze(one))
            distance = opset23.Clip(query_positions - keys, opset23.Squeeze(zero), opset23.Squeeze(N - 1))  # [B, S]
            gathered = opset23.Gather(by_distance, distance, axis=1)  # [H, B, S]
            bias = opset23.Unsqueeze(opset23.Transpose(gathered, perm=[1, 0, 2]), opset23.Constant(value_ints=[2]))
        else:  # all rows at the same positions: column n of `vector` is the distance end - 1 - n
            start = opset23.Reshape(opset23.Slice(query_positions, zero, one, zero), minus_one)
            end = opset23.Slice(start, zero, one) + T
            reverse = opset23.Slice(by_distance, minus_one, first, one, minus_one)
            beyond = opset23.Expand(
                opset23.Slice(reverse, zero, one, one), opset23.Concat(H, opset23.Max(end - N, zero), axis=0)
            )
            near = opset23.Slice(reverse, opset23.Max(N - end, zero), last, one)
            future = opset23.Expand(opset23.Slice(reverse, minus_one, last, one), opset23.Concat(H, T, axis=0))
            vector = opset23.Concat(beyond, near, future, axis=1)  # [H, end + T]
            M = end + T
            copies = opset23.Expand(
                opset23.Unsqueeze(vector, one), opset23.Concat(H, T, M, axis=0)
            )  # row i of the flat copies, cut M - 1 long from T - 1 on, begins T - 1 - i columns into the vector
            flat = opset23.Reshape(copies, opset23.Concat(H, minus_one, axis=0))
            cut = opset23.Slice(flat, T - 1, T - 1 + T * (M - 1), one)
            skewed = opset23.Reshape(cut, opset23.Concat(one, H, T, M - 1, axis=0))
            bias = opset23.Slice(skewed, zero, S, opset23.Constant(value_ints=[3]))  # [1, H, T, S]
        return bias

    return T5RelativeBias


T5RelativeBiasGeneral = _general()
T5RelativeBiasCompact = _compact()


def _translate(weight, query_positions, key_positions, key_length, max_distance: int = 128):  # type: ignore[no-untyped-def]
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
    counts as distance 0. With key_positions None, the ONNX function takes consecutive query positions that all rows
    share, or T = 1; it then returns ``[1, H, T, S]`` where the rows share them.
    """
    buckets = bucket_of_distance(weight.shape[0], max_distance).to(weight.device)
    if key_positions is None:
        key_positions = torch.arange(key_length, device=weight.device)[None]
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(0, max_distance)  # [B, T, S]
    return weight[buckets[distance]].permute(0, 3, 1, 2).contiguous()
