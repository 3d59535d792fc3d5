"""LongCat-Flash runs its experts in a loop over those that were chosen; some of them give their input back.

``forward`` of the experts takes the weights of each token's own, and the input for those that have none::

    y = sum over its experts e of weight[e] down[e] (act(gate[e] x) * (up[e] x)), or weight[e] x
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``forward`` of each layer's experts, where not all of them are identities."""
    for module in model.modules():
        if type(module).__name__ == "LongcatFlashExperts" and module.num_routed_experts:
            yield Substitution(module, "forward", _experts(module))


def _experts(module: Any) -> Callable[..., torch.Tensor]:
    last = module.num_routed_experts - 1

    def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        chosen = top_k_index.clamp(max=last)  # [N, k]
        gate, up = (module.gate_up_proj[chosen] @ x[:, None, :, None]).chunk(2, 2)  # each [N, k, F, 1]
        outputs = (module.down_proj[chosen] @ (module.act_fn(gate) * up)).squeeze(-1)  # [N, k, C]
        outputs = torch.where((top_k_index > last)[..., None], x[:, None], outputs)
        return (outputs * top_k_weights[..., None]).sum(1).to(x.dtype)

    return forward
