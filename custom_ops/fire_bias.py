"""FIRE: a network of one hidden layer on the distance, measured against the query's own position.

Li et al. 2024, Functional Interpolation for Relative Positions, section 3::

    d = max(query_position - key_position, 0)        L = |threshold|
    x = psi(d) / psi(max(query_position, L))         psi(y) = log(|c| y + 1)
    bias[b, h, i, j] = output[h] . relu(hidden x + hidden_bias) + output_bias[h]

x stays within 0 and 1 at any length. The bias is a function of the distance and of the query's position, so that it is
computed in full: of T queries, T S hidden values for each unit.
"""

import torch
from onnxscript import FLOAT, INT64, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator


def _fake(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    c_and_threshold: torch.Tensor,
    hidden: torch.Tensor,
    hidden_bias: torch.Tensor,
    output: torch.Tensor,
    output_bias: torch.Tensor,
) -> torch.Tensor:
    (B, T), S = query_positions.shape, key_positions.shape[-1]
    return output.new_empty(B, output.shape[0], T, S)


@script(PE_ONNX, default_opset=opset23)
def FireBias(
    query_positions: INT64,
    key_positions: INT64,
    c_and_threshold: FLOAT,
    hidden: FLOAT,
    hidden_bias: FLOAT,
    output: FLOAT,
    output_bias: FLOAT,
) -> FLOAT:
    # in float32: float16 counts no distance beyond 2048
    one = opset23.Constant(value_float=1.0)
    learned = opset23.Abs(opset23.Cast(c_and_threshold, to=1))
    c = opset23.Gather(learned, 0)
    threshold = opset23.Gather(learned, 1)
    queries = opset23.Unsqueeze(opset23.Cast(query_positions, to=1), opset23.Constant(value_ints=[2]))  # [B, T, 1]
    keys = opset23.Unsqueeze(opset23.Cast(key_positions, to=1), opset23.Constant(value_ints=[1]))  # [B, 1, S]
    near = opset23.Log(c * opset23.Relu(queries - keys) + one)
    x = near / opset23.Log(c * opset23.Max(queries, threshold) + one)  # [B, T, S]
    weights = opset23.Reshape(opset23.Cast(hidden, to=1), opset23.Constant(value_ints=[-1]))
    units = opset23.Unsqueeze(x, opset23.Constant(value_ints=[3])) * weights + opset23.Cast(hidden_bias, to=1)
    out = opset23.Transpose(opset23.Cast(output, to=1), perm=[1, 0])  # [M, H]
    bias = opset23.MatMul(opset23.Relu(units), out) + opset23.Cast(output_bias, to=1)  # [B, T, S, H]
    return opset23.CastLike(opset23.Transpose(bias, perm=[0, 3, 1, 2]), output)


@operator(_fake, FireBias)
def fire_bias(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    c_and_threshold: torch.Tensor,
    hidden: torch.Tensor,
    hidden_bias: torch.Tensor,
    output: torch.Tensor,
    output_bias: torch.Tensor,
) -> torch.Tensor:
    """The bias to add to the scaled scores.

    query_positions: int64 ``[B, T]``. key_positions: int64 ``[B, S]`` or ``[1, S]``. c_and_threshold: ``[2]``.
    hidden: ``[M, 1]``, hidden_bias ``[M]``, output ``[H, M]``, output_bias ``[H]``. Returns ``[B, H, T, S]`` of the
    dtype of output; a key after its query counts as distance 0, and is to be masked.
    """
    c, threshold = c_and_threshold.float().abs()
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(min=0).float()  # [B, T, S]
    normalizer = torch.log(c * torch.maximum(query_positions.float(), threshold) + 1)  # [B, T]
    x = torch.log(c * distance + 1) / normalizer[..., None]
    units = torch.relu(x[..., None] * hidden.float().flatten() + hidden_bias.float())  # [B, T, S, M]
    bias = units @ output.float().T + output_bias.float()  # [B, T, S, H]
    return bias.permute(0, 3, 1, 2).to(output.dtype).contiguous()
