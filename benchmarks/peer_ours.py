"""A bundle in our runtime, as a contestant of ``peers.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from peer_worker import Array, serve


class Ours:
    def __init__(self) -> None:
        from pe_onnx import load

        self.open = load

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        self.model = self.open(path, threads=threads)
        self.cache = self.model.cache(1, capacity_tokens)
        self.cache.reserve(capacity_tokens)

    def append(self, ids: Sequence[int]) -> Any:
        return self.cache.decode(list(ids))[0] if len(ids) == 1 else self.cache.prefill([list(ids)])[0]

    def rewind(self, tokens: int) -> None:
        self.cache.lengths[:] = tokens
        del self.cache.tokens[0][tokens:]

    def logits(self, ids: Sequence[int]) -> Array:
        """Step by step: a bundle of target ``ort`` gives those of a run's last token."""
        self.rewind(0)
        return np.stack([self.cache.decode([token])[0].copy() for token in ids])


if __name__ == "__main__":
    serve(Ours)
