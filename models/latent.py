"""Multi-head latent attention: one latent of keys and values a token, in the cache and in the attention.

DeepSeek-V2, section 2.1 (transformers 5.23: ``expand_kv``). A head's keys and values are two maps of a latent c, beside
a rotated part r that all heads share. Both maps are linear, so they move to the query and to the output::

    q_h . (W_h c, r) = (q_h W_h, q_r) . (c, r)          sum_j p_j V_h c_j = V_h (sum_j p_j c_j)

Attention is then of H query heads on one key head (c, r), whose value is c; the cache holds no key or value of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.errors import CheckpointError
from pe_onnx.models.substitution import Substitution


def is_latent(module: Any) -> bool:
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj")


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``expand_kv`` gives what is cached. Raises CheckpointError for a map that is not linear."""
    for module in model.modules():
        if is_latent(module):
            if not isinstance(module.kv_b_proj, nn.Linear) or module.kv_b_proj.bias is not None:
                raise CheckpointError(f"{type(module).__name__}: its kv_b_proj is not one linear map without bias")
            yield Substitution(module, "expand_kv", cached)


def cached(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, 1, T, L]`` and ``[B, 1, T, R]`` to the key ``[B, 1, T, L + R]`` and the value ``[B, 1, T, L]``."""
    return torch.cat((latent, rotated), -1), latent


def query_of(module: Any, query: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, N + R]`` to ``[B, H, T, L + R]``."""
    N = module.qk_nope_head_dim
    return torch.cat((query[..., :N] @ _maps(module)[:, :N], query[..., N:]), -1)


def values_of(module: Any, output: torch.Tensor) -> torch.Tensor:
    """``[B, T, H, L]`` to ``[B, T, H, E]``."""
    return (output.transpose(1, 2) @ _maps(module)[:, module.qk_nope_head_dim :].mT).transpose(1, 2)


def _maps(module: Any) -> torch.Tensor:
    """``[H, N + E, L]``: of each head the map to its key, then to its value."""
    weight = module.kv_b_proj.weight
    return weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, weight.shape[1])
