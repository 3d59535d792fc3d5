"""DBRX runs its experts one after the other in a loop over those that were chosen, which no graph can follow.

``forward`` of the experts takes the weights of each token's own::

    y = sum over its experts e of weight[e] (act(w1[e] x) * (v1[e] x)) w2[e]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``forward`` of each layer's experts."""
    for module in model.modules():
        if type(module).__name__ == "DbrxExperts":
            yield Substitution(module, "forward", _experts(module))


def _experts(module: Any) -> Callable[..., torch.Tensor]:
    mlp, shape = module.mlp, (module.num_experts, module.ffn_hidden_size, module.hidden_size)

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, 1, module.hidden_size, 1)  # [N, 1, C, 1]
        w1, v1, w2 = (w.view(shape)[top_k_index] for w in (mlp.w1, mlp.v1, mlp.w2))  # [N, k, F, C]
        inner = mlp.activation_fn(w1 @ x) * (v1 @ x)  # [N, k, F, 1]
        outputs = (inner.mT @ w2).squeeze(2)  # [N, k, C]
        return (outputs * top_k_weights[..., None]).sum(1).view(hidden.shape)

    return forward
