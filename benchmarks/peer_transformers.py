"""transformers in PyTorch's eager mode, as a contestant of ``peers.py``, with the cache that ``generate`` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peer_worker import Array, serve


class Transformers:
    """attention: ``eager`` or ``sdpa``. dtype: torch's name, of weights and cache."""

    def __init__(self, attention: str = "sdpa", dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        self.torch, self.auto, self.new_cache = torch, AutoModelForCausalLM, DynamicCache
        self.attention, self.dtype = attention, dtype

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        self.torch.set_num_threads(threads)
        dtype = getattr(self.torch, self.dtype)
        self.model = self.auto.from_pretrained(path, dtype=dtype, attn_implementation=self.attention).eval()
        self.cache = self.new_cache()

    def append(self, ids: Sequence[int]) -> Any:
        return self._run(ids, 1)[-1]

    def rewind(self, tokens: int) -> None:
        held = self.cache.get_seq_length()
        if not tokens:
            self.cache = self.new_cache()
        elif tokens < held:
            self.cache.crop(tokens - held)

    def logits(self, ids: Sequence[int]) -> Array:
        self.rewind(0)
        return self._run(ids, 0)

    def _run(self, ids: Sequence[int], kept: int) -> Array:
        """kept: tokens whose logits are made, from the end; 0 for all."""
        with self.torch.inference_mode():
            given = self.torch.tensor([ids])
            output = self.model(given, past_key_values=self.cache, use_cache=True, logits_to_keep=kept)
            return output.logits[0].float().numpy()


if __name__ == "__main__":
    serve(Transformers)
