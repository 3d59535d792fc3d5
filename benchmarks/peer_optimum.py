"""optimum's ONNX export of a decoder in onnxruntime, as a contestant of ``peers.py``. Fixed to float32.

python benchmarks/peer_optimum.py CHECKPOINT OUTPUT     # exports
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from peer_worker import Array, serve


class Optimum:
    def __init__(self) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        self.onnxruntime, self.torch, self.auto = onnxruntime, torch, ORTModelForCausalLM

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        self.torch.set_num_threads(threads)
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = self.auto.from_pretrained(path, session_options=options)
        self.past: Any = None

    def append(self, ids: Sequence[int]) -> Any:
        return self._run(ids)[-1]

    def rewind(self, tokens: int) -> None:
        """What grows is a tuple of keys and values ``[1, K, P, D]`` for each layer."""
        if not tokens:
            self.past = None
        elif self.past is not None:
            self.past = tuple(tuple(part[:, :, :tokens] for part in layer) for layer in self.past)

    def logits(self, ids: Sequence[int]) -> Array:
        self.rewind(0)
        return self._run(ids)

    def _run(self, ids: Sequence[int]) -> Array:
        held = 0 if self.past is None else self.past[0][0].shape[2]
        with self.torch.inference_mode():
            given = self.torch.tensor([ids])
            mask = self.torch.ones((1, held + len(ids)), dtype=self.torch.int64)
            positions = self.torch.arange(held, held + len(ids))[None]
            output = self.model(given, mask, past_key_values=self.past, position_ids=positions, use_cache=True)
        self.past = output.past_key_values
        return output.logits[0].numpy()


def export(checkpoint: str, output: str) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    ORTModelForCausalLM.from_pretrained(checkpoint, export=True).save_pretrained(output)


if __name__ == "__main__":
    export(*sys.argv[1:]) if len(sys.argv) > 1 else serve(Optimum)
