"""transformers on a CUDA device beside ours, for ``cuda.py``."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import click
import numpy as np
from steps import WARM_UP, fill, median_ms

PROMPT_REPEATS = 3
STATIC_ROOM = 128
"""Slots of PyTorch's static cache beyond the context, into which its steps go on."""

Step = Callable[[], None]


class TorchLlama:
    """transformers' Llama of some sizes, random weights, on the device."""

    def __init__(self, dtype: str, sizes: Mapping[str, Any]) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch = torch
        names = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.config = LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="sdpa")
        with torch.device("cuda"):
            torch.set_default_dtype(names[dtype])
            try:
                self.model = LlamaForCausalLM(self.config).eval()
            finally:
                torch.set_default_dtype(torch.float32)

    def _filled(self, cache: Any, context: int) -> Any:
        torch, c = self.torch, self.config
        size = c.hidden_size // c.num_attention_heads
        shape = (1, c.num_key_value_heads, context, size)
        position = torch.arange(context, device="cuda")
        for layer in range(c.num_hidden_layers):
            values = torch.randn(shape, dtype=self.model.dtype, device="cuda")
            cache.update(values, values, layer, {"cache_position": position})
        return cache

    def eager(self, context: int) -> Step:
        """A step behind ``context`` tokens in a cache that grows, and is cut back."""
        torch = self.torch
        from transformers import DynamicCache

        cache = self._filled(DynamicCache(config=self.config), context)
        ids = torch.full((1, 1), 7, dtype=torch.int64)

        def step() -> None:
            with torch.inference_mode():
                logits = self.model(ids.to("cuda"), past_key_values=cache, use_cache=True).logits
                logits[:, -1].float().cpu()
                cache.crop(-1)

        return step

    def compiled(self, context: int) -> Step:
        """A step in a static cache, compiled and replayed as a CUDA graph."""
        torch = self.torch
        from transformers import StaticCache

        cache = StaticCache(config=self.config, max_cache_len=context + STATIC_ROOM)
        with torch.inference_mode():
            self._filled(cache, context)
        forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=False)
        ids = torch.full((1, 1), 7, dtype=torch.int64)

        def step() -> None:
            with torch.inference_mode():
                logits = forward(ids.to("cuda"), past_key_values=cache, use_cache=True).logits
                logits[:, -1].float().cpu()

        return step

    def prefill(self, tokens: int) -> float:
        """Median tokens/s of a prompt, eager."""
        torch = self.torch
        ids = torch.randint(0, 256, (1, tokens))
        times = []
        for repeat in range(PROMPT_REPEATS + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.inference_mode():
                self.model(ids.to("cuda"), use_cache=True, logits_to_keep=1).logits.float().cpu()
            if repeat:
                times.append(time.perf_counter() - begin)
        return tokens / statistics.median(times)


def against_torch(
    model: Any, dtype: str, sizes: Mapping[str, Any], contexts: list[int], compiled: list[int], repeats: int
) -> dict[str, Any]:
    """Decode ms of ours, of eager and of compiled PyTorch, in turns; prefill tokens/s of eager PyTorch."""
    llama = TorchLlama(dtype, sizes)
    result: dict[str, Any] = {}
    for context in contexts:
        cache = model.cache(1, context + 8)
        back = fill(cache, context, np.random.default_rng(0))

        def ours(cache: Any = cache, back: Step = back) -> None:
            back()
            cache.decode([7])

        steps: dict[str, Step] = {"pe-onnx": ours}
        with reported(f"eager at {context}"):
            steps["PyTorch eager"] = llama.eager(context)
        if context in compiled:
            with reported(f"compiled at {context}"):
                steps["PyTorch compiled"] = llama.compiled(context)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats + WARM_UP):
            for name, step in list(steps.items()):
                with reported(f"{name} at {context}"):
                    begin = time.perf_counter()
                    step()
                    spent = time.perf_counter() - begin
                    if repeat >= WARM_UP:
                        times[name].append(spent)
                    continue
                del steps[name]
        result[str(context)] = {name: {"ms": median_ms(each)} for name, each in times.items() if each}
        with reported(f"prompt of {context}"):
            result[str(context)].setdefault("PyTorch eager", {})["prefill"] = llama.prefill(context)
        click.echo(f"at {context}: {json.dumps(result[str(context)])}", err=True)
    return result


class reported(suppress):  # noqa: N801
    """What PyTorch cannot do is said and left out."""

    def __init__(self, what: str) -> None:
        super().__init__(Exception)
        self.what = what

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is not None:
            click.echo(f"{self.what}: {type(error).__name__}: {str(error)[:300]}", err=True)
        return bool(super().__exit__(kind, error, trace))
