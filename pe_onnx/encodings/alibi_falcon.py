"""ALiBi as Falcon defines it: BLOOM's slopes in bfloat16, the product rounded to it, and scaled like the scores.

bfloat16 has 8 bits, so the penalty is a staircase in the key's position, and not a function of the distance. Falcon
adds the first term alone; softmax ignores the second, which keeps the scores small where positions are great.

Formula::

    term[h, t] = bf16(bf16(slope[h]) * bf16(t)) / sqrt(D)
    bias[b, h, i, j] = term[h, key_position[b, j]] - term[h, query_position[b, i]]

Paper: Falcon-RW, of Penedo et al. 2023, The RefinedWeb Dataset for Falcon LLM; transformers 5.23
``falcon.build_alibi_tensor``.

Cost: no parameters. H (T + S) terms and H T S subtractions a step, made once for all layers.

Cache: cached keys hold no position and stay as they are. The bias is made anew at each step for every key. It depends
on both positions, not on the length.

Limits: no length limit, but neighbouring keys share a term from position 256 on, where bfloat16 no longer counts single
tokens. Any head count. No operator of its own: the graph spells it out.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding
from pe_onnx.encodings.alibi_bloom import slopes


def to_bfloat16_and_back(x: torch.Tensor) -> torch.Tensor:
    """float32, rounded to 8 bits, to nearest even."""
    return x.bfloat16().float()


class AlibiFalcon(PositionalEncoding):
    """No parameters; any head count."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.slopes = to_bfloat16_and_back(slopes(config.num_attention_heads))
        self.score_scale = config.head_size**-0.5

    def term(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 ``[B, T]`` to float32 ``[B, H, T]``."""
        slopes = self.slopes.to(positions.device)[:, None]  # [H, 1]
        return to_bfloat16_and_back(slopes * to_bfloat16_and_back(positions.float())[:, None]) * self.score_scale

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        if key_positions is None:
            key_positions = torch.arange(key_length, device=query_positions.device)[None]
        return self.term(key_positions)[:, :, None] - self.term(query_positions)[..., None]
