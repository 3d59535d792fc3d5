"""Rotation that a modeling file writes with complex numbers, which ONNX has not, by our operator.

Llama 4 and DeepSeek V2 (transformers 5.23): the rotary module gives e^(i angle) ``[B, T, R/2]``, and
``apply_rotary_emb(xq, xk, freqs_cis)`` multiplies pairs of channels by it. Here the module gives cosine and sine, and
the function is our interleaved rotation; both are run against the file's own before they stand in for them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.errors import CheckpointError
from pe_onnx.models.rotation import TOLERANCE, Reading
from pe_onnx.models.substitution import Substitution

READING = Reading(interleaved=True, layout="not repeated", sign=1)
POSITIONS = torch.tensor([[0, 1, 5, 100, 4000]])


@torch.no_grad()
def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """For each complex rotary module of the model, and the functions of its file that take what it gives.

    Raises CheckpointError where one is not understood.
    """
    rotaries = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding") and hasattr(m, "inv_freq")]
    homes = set()
    for module in rotaries:
        if "polar" not in inspect.unwrap(type(module).forward).__code__.co_names:
            continue
        yield Substitution(module, "forward", _real(module))
        homes.add(type(module).__module__)
    for home in sorted(homes):
        for name, function in vars(sys.modules[home]).items():
            if inspect.isfunction(function) and "freqs_cis" in inspect.signature(function).parameters:
                yield Substitution(sys.modules[home], name, _rotation(function))


def _real(module: Any) -> Callable[..., torch.Tensor]:
    """To cosines and sines ``[2, B, T, R/2]``, proven."""

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None].float() * module.inv_freq.float()
        return torch.stack((angles.cos(), angles.sin())) * module.attention_scaling

    want, have = module(torch.zeros(1), POSITIONS), forward(torch.zeros(1), POSITIONS)
    if not torch.allclose(torch.stack((want.real, want.imag)), have, rtol=0, atol=TOLERANCE):
        raise CheckpointError(f"{type(module).__name__}: its complex frequencies are not understood")
    return forward


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    """On tables of ``_real``: heads before tokens, or after, whichever agrees with the original."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(2, 3, 4, generator=generator)  # B, T, R/2
    for heads_axis, shape in ((1, (2, 5, 3, 8)), (2, (2, 3, 5, 8))):
        q, k = torch.randn(2, *shape, generator=generator)

        def rotate(
            xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor, heads_axis: int = heads_axis
        ) -> tuple[torch.Tensor, ...]:
            return tuple(READING.rotate(x, freqs_cis[0], freqs_cis[1], heads_axis) for x in (xq, xk))

        try:
            want = original(q, k, torch.polar(torch.ones_like(angles), angles))
        except RuntimeError:  # tokens stand on the other axis
            continue
        have = rotate(q, k, torch.stack((angles.cos(), angles.sin())))
        if all(torch.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in zip(want, have, strict=True)):
            return rotate
    raise CheckpointError(f"{original.__module__}.{original.__name__}: its complex rotation is not understood")
