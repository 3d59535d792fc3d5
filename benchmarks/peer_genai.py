"""onnxruntime-genai, as a contestant of ``peers.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from peer_worker import Array, serve


class Genai:
    def __init__(self) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        config = self.genai.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = self.genai.Model(config)
        self.capacity_tokens = capacity_tokens
        self._begin()

    def _begin(self) -> None:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.capacity_tokens, batch_size=1)
        self.generator = self.genai.Generator(self.model, parameters)

    def append(self, ids: Sequence[int]) -> Any:
        self.generator.append_tokens(np.asarray([ids], np.int32))
        return self.generator.get_logits().reshape(-1)

    def rewind(self, tokens: int) -> None:
        self.generator.rewind_to(tokens)

    def logits(self, ids: Sequence[int]) -> Array:
        """Of a model built without ``prune_lm_head``."""
        self.rewind(0)
        self.append(ids)
        return np.asarray(self.generator.get_output("logits"), np.float32)[0, : len(ids)]


if __name__ == "__main__":
    serve(Genai)
