"""RMS norms of a transformers model by PyTorch's own, where that is proven equal on random input.

transformers writes ``LlamaRMSNorm`` anew in each modeling file; Gemma multiplies by 1 + weight. The exporter makes one
RMSNormalization node of PyTorch's. Zhang and Sennrich 2019, equation 4::

    y = x / sqrt(mean(x^2) + eps) * weight
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from pe_onnx.models.substitution import Substitution

Weight = Callable[[torch.Tensor], torch.Tensor]
READINGS: dict[str, Weight] = {"weight": lambda weight: weight, "1 + weight": lambda weight: 1 + weight}
TOLERANCE = 2e-6
"""Relative to the greatest output, float32."""


def prove_norms(model: nn.Module) -> list[Substitution]:
    """A replacement of ``forward`` for each norm that computes what PyTorch's does."""
    found = []
    for module in model.modules():
        if type(module).__name__.endswith("Norm") and type(module).__module__.startswith("transformers.models."):
            forward = _proven(module)
            if forward is not None:
                found.append(Substitution(module, "forward", forward))
    return found


@torch.no_grad()
def _proven(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_children()]
    if own != ["weight"] or weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = 3 * torch.randn(2, 3, weight.shape[0], generator=torch.Generator().manual_seed(0)) + 0.5
    x[1] *= eps**0.5  # where eps is a good part of the divisor
    try:
        want = module(x)
        narrows = copy.deepcopy(module).half()(x).dtype == torch.float16  # T5's, in a stream of float32
    except Exception:  # another signature: not ours to replace
        return None
    for reading in READINGS.values():

        def forward(x: torch.Tensor, reading: Weight = reading) -> torch.Tensor:
            scale = reading(weight).to(x.dtype)
            output = F.rms_norm(x, scale.shape, scale, eps)
            return output.to(weight.dtype) if narrows else output

        have = forward(x)
        if have.shape == want.shape and float((have - want).abs().max()) <= TOLERANCE * float(want.abs().max()):
            return forward
    return None
