"""A bias that is a function of the distance alone: a number per head and distance, put into place.

KERPLE (Chi et al. 2022) and every encoding of one's own whose term on the scores sees ``i - j`` only::

    bias[b, h, i, j] = by_distance[h, clip(query_position[b, i] - key_position[b, j], 0, N - 1)]

The function itself is evaluated once per distance, N times in place of T S times. Of one query whose keys stand in a
row the bias is then a slice.
"""

import torch
from onnxscript import FLOAT, INT64, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(
    by_distance: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int
) -> torch.Tensor:
    (B, T), H = query_positions.shape, by_distance.shape[0]
    return by_distance.new_empty(B, H, T, key_length)


@script(PE_ONNX, default_opset=opset23)
def DistanceBias(by_distance: FLOAT, query_positions: INT64, key_positions: INT64, consecutive: int) -> FLOAT:
    """consecutive: keys stand at 0 .. S - 1, so that the bias of one query is a slice of the reversed vectors."""
    one = opset23.Constant(value_int=1)
    axis0 = opset23.Constant(value_ints=[0])
    axis1 = opset23.Constant(value_ints=[1])
    farthest = opset23.Shape(by_distance, start=1, end=2) - 1  # [1]
    one_row = opset23.Squeeze(opset23.Equal(opset23.Shape(query_positions, start=0, end=1), one))
    is_slice = opset23.And(opset23.Cast(opset23.Constant(value_int=consecutive), to=9), one_row)
    if opset23.And(is_slice, opset23.Equal(opset23.Size(query_positions), one)):
        # distances q .. q - S + 1, those before 0 as 0; a negative pad cuts off what is too far, a positive one repeats
        q = opset23.Reshape(query_positions, opset23.Constant(value_ints=[1]))
        S = opset23.Shape(key_positions, start=1, end=2)
        last = opset23.Constant(value_ints=[-1])
        before_first = opset23.Constant(value_ints=[-(2**63)])
        reversed_vectors = opset23.Slice(by_distance, last, before_first, axis1, last)
        reverse = opset23.Unsqueeze(reversed_vectors, opset23.Constant(value_ints=[0, 2]))  # [1, H, 1, N]
        zeros = opset23.Constant(value_ints=[0, 0, 0])
        pads = opset23.Concat(zeros, q - farthest, zeros, S - 1 - q, axis=0)
        bias = opset23.Pad(reverse, pads, mode="edge")  # [1, H, 1, S]
    else:
        queries = opset23.Unsqueeze(query_positions, opset23.Constant(value_ints=[2]))
        distance = queries - opset23.Unsqueeze(key_positions, axis1)  # [B, T, S]
        index = opset23.Max(opset23.Min(distance, farthest), opset23.Constant(value_ints=[0]))
        if one_row:  # gathered into place: the one [T, S] matrix a head is never copied
            gathered = opset23.Gather(opset23.Unsqueeze(by_distance, axis0), opset23.Gather(index, 0), axis=2)
        else:
            gathered = opset23.Transpose(opset23.Gather(by_distance, index, axis=1), perm=[1, 0, 2, 3])
        bias = opset23.Identity(gathered)  # [B, H, T, S]
    return bias


def _translate(by_distance, query_positions, key_positions, key_length):
    consecutive = key_positions is None
    if consecutive:
        slots = opset23.Range(opset23.Constant(value_int=0), key_length, opset23.Constant(value_int=1))
        key_positions = opset23.Unsqueeze(slots, opset23.Constant(value_ints=[0]))
    return DistanceBias(by_distance, query_positions, key_positions, consecutive=int(consecutive))


@operator(_fake, _translate)
def distance_bias(
    by_distance: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int
) -> torch.Tensor:
    """The bias to add to the scaled scores.

    by_distance: ``[H, N]``, the term for the distances 0 .. N - 1; greater ones have the last. query_positions: int64
    ``[B, T]``. key_positions: int64 ``[B, S]``, or None for keys at 0 .. S - 1 in every row, which makes a step of one
    row a slice. key_length: S. Returns ``[B, H, T, S]`` of the dtype of by_distance; a key after its query counts as
    distance 0, and is to be masked.
    """
    if key_positions is None:
        key_positions = torch.arange(key_length, device=by_distance.device)[None]
    farthest = by_distance.shape[1] - 1
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(0, farthest)  # [B, T, S]
    return by_distance[:, distance].transpose(0, 1).contiguous()
