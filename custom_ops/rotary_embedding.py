"""Rotary position embedding: pairs of channels of queries or keys rotated by an angle that grows with the position.

Su et al. 2021, RoFormer, equation 34; the two pairings as in ONNX RotaryEmbedding-23::

    out[a] = x[a] cos - x[b] sin        half-split:  (a, b) = (i, i + R/2)     GPT-NeoX, Llama
    out[b] = x[b] cos + x[a] sin        interleaved: (a, b) = (2i, 2i + 1)     RoFormer, GPT-J

for i < R/2. Channels from R on pass unrotated (partial rotary, GPT-NeoX).
"""

import torch
from onnxscript import FLOAT, opset23, script

from pe_onnx.custom_ops._onnx import PE_ONNX
from pe_onnx.custom_ops._operator import operator
from pe_onnx.errors import ConfigError


def _fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int = 0, interleaved: bool = False
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@script(PE_ONNX, default_opset=opset23)
def RotaryEmbedding(x: FLOAT, cos: FLOAT, sin: FLOAT, num_heads: int, interleaved: int, rotary_dim: int) -> FLOAT:
    """x of the dtype of cos and sin. num_heads is 0 for a 4D x, rotary_dim is R."""
    return opset23.RotaryEmbedding(
        x, cos, sin, num_heads=num_heads, interleaved=interleaved, rotary_embedding_dim=rotary_dim
    )


def _translate(x, cos, sin, num_heads: int = 0, interleaved: bool = False):
    same = x.dtype == cos.dtype
    rotated = RotaryEmbedding(  # a half-precision x is rotated by float32 tables in float32, and rounded once
        x if same else opset23.CastLike(x, cos),
        cos,
        sin,
        num_heads=num_heads,
        interleaved=int(interleaved),
        rotary_dim=2 * int(cos.shape[-1]),
    )
    return rotated if same else opset23.CastLike(rotated, x)


@operator(_fake, _translate)
def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int = 0, interleaved: bool = False
) -> torch.Tensor:
    """Rotate ``x`` by the angles whose cosines and sines are given.

    x: ``[B, H, T, D]``, or packed ``[B, T, H*D]`` with ``num_heads`` = H; float32 or a half precision.
    cos, sin: ``[B, T, R/2]``, R <= D even, of the dtype of x or float32.
    Returns a tensor of the shape and dtype of x. Raises ConfigError for a rotary size beyond the head size.
    """
    heads_first = x if x.dim() == 4 else x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
    half = cos.shape[-1]
    if 2 * half > heads_first.shape[-1]:
        raise ConfigError(f"rotary size = {2 * half} must be at most the head size = {heads_first.shape[-1]}")
    rotated, passed = heads_first[..., : 2 * half].to(cos.dtype), heads_first[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, R/2]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = torch.cat((out.to(x.dtype), passed), -1)
    return out.contiguous() if x.dim() == 4 else out.transpose(1, 2).flatten(2)
