"""ALiBi: a linear penalty on the distance between query and key, one slope per head.

Press, Smith and Lewis 2021, Train Short, Test Long, section 3::

    bias[b, h, i, j] = -slope[h] * (query_position[b, i] - key_position[b, j])
"""

import torch
from onnxscript import FLOAT, INT64, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(slopes: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    (B, T), S = query_positions.shape, key_positions.shape[-1]
    return slopes.new_empty(B, slopes.shape[0], T, S)


@script(PE_ONNX, default_opset=opset23)
def AlibiBias(slopes: FLOAT, query_positions: INT64, key_positions: INT64) -> FLOAT:
    # float32 counts positions exactly to 2^24, float16 no distance beyond 2048
    queries = opset23.Unsqueeze(opset23.Cast(query_positions, to=1), opset23.Constant(value_ints=[1, 3]))
    keys = opset23.Unsqueeze(opset23.Cast(key_positions, to=1), opset23.Constant(value_ints=[1, 2]))
    per_head = opset23.Unsqueeze(opset23.Cast(slopes, to=1), opset23.Constant(value_ints=[1, 2]))  # [H, 1, 1]
    return opset23.CastLike(per_head * (keys - queries), slopes)  # [H, 1, 1] * [B, 1, T, S]


@operator(_fake, AlibiBias)
def alibi_bias(slopes: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """The bias to add to the scaled scores.

    slopes: ``[H]``. query_positions: int64 ``[B, T]``. key_positions: int64 ``[B, S]`` or ``[1, S]``.
    Returns ``[B, H, T, S]`` of the dtype of slopes; keys after their query get a positive entry, and are to be masked.
    """
    distance = (key_positions[:, None, :] - query_positions[:, :, None]).float()  # [B, T, S]
    return (slopes.float()[:, None, None] * distance[:, None]).to(slopes.dtype)
