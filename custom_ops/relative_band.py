"""T5's bias of an encoder, by buckets of the signed distance, as a band whose slices are the bias of any queries.

Raffel et al. 2020, section 2.1; bidirectional buckets as `t5_relative_bias` has them, of r = key position - query
position, m = max_distance::

    band[0, h, i, w] = weight[bucket(clip(w - m - i, -m, m)), h]               w = 0 .. R + 2m - 1

A bias of the distance alone is a Toeplitz matrix: row i of the band is row 0 moved by i. So the bias of the R queries
from s on against all keys is the band, its column w at key s + w - m, with the first and the last column repeated
beyond: no gather, whatever the length of the source.
"""

import torch
from onnxscript import FLOAT, INT64, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator
from pe_onnx.custom_ops.t5_relative_bias import bucket_of_distance

CHUNK = 128
"""Queries that are attended to at once: with 64 every key is packed twice as often, with 256 scores leave the cache."""


def buckets_by_offset(num_buckets: int, max_distance: int) -> torch.Tensor:
    """Bucket of each key position - query position from -max_distance to max_distance, int64 ``[2 max_distance + 1]``.

    Raises ConfigError where the formula has no meaning.
    """
    return bucket_of_distance(num_buckets, max_distance, bidirectional=True).flip(0)


def _fake(weight: torch.Tensor, max_distance: int = 128, rows: int = CHUNK) -> torch.Tensor:
    return weight.new_empty(1, weight.shape[1], rows, rows + 2 * max_distance)


@script(PE_ONNX, default_opset=opset23)
def RelativeBand(weight: FLOAT, buckets: INT64, rows: int) -> FLOAT:
    one = opset23.Constant(value_int=1)
    zero = opset23.Constant(value_int=0)
    R = opset23.Constant(value_int=rows)
    farthest = opset23.Size(buckets) - one  # 2 max_distance
    by_offset = opset23.Transpose(opset23.Gather(weight, buckets), perm=[1, 0])  # [H, 2 max_distance + 1]
    columns = opset23.Range(zero, R + farthest, one)
    row = opset23.Unsqueeze(opset23.Range(zero, R, one), opset23.Constant(value_ints=[1]))
    index = opset23.Clip(columns - row, zero, farthest)  # [R, W]
    return opset23.Gather(opset23.Unsqueeze(by_offset, opset23.Constant(value_ints=[0])), index, axis=2)


def _translate(weight, max_distance: int = 128, rows: int = CHUNK):
    buckets = opset23.Constant(value_ints=buckets_by_offset(int(weight.shape[0]), max_distance).tolist())
    return RelativeBand(weight, buckets, rows=rows)


@operator(_fake, _translate)
def relative_band(weight: torch.Tensor, max_distance: int = 128, rows: int = CHUNK) -> torch.Tensor:
    """The band of an encoder's T5 bias, for `encoder_attention`; once for all layers that share the table.

    weight: ``[num_buckets, H]``. rows: R, the queries that are attended to at once. Returns ``[1, H, R, R + 2
    max_distance]`` of the dtype of weight.
    """
    buckets = buckets_by_offset(weight.shape[0], max_distance).to(weight.device)
    row = torch.arange(rows, device=weight.device)[:, None]
    columns = torch.arange(rows + 2 * max_distance, device=weight.device)
    index = (columns - row).clamp(0, 2 * max_distance)  # [R, W]
    return weight[buckets[index]].permute(2, 0, 1)[None].contiguous()
