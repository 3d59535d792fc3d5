"""A bundle in our runtime, as a contestant of ``peers.py``; ``logits`` needs one exported with ``--logits all``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        self.rewind(0)
        return self.cache.prefill([list(ids)], all_logits=True)[0]


if __name__ == "__main__":
    serve(Ours)
