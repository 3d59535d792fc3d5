"""llama.cpp through ``llama-cpp-python``'s C bindings, as a contestant of ``peers.py``.

python benchmarks/peer_llama_cpp.py FROM.gguf TO.gguf Q4_0     # quantizes, as llama-quantize does by default
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from peer_worker import CHUNK_TOKENS, Array, serve

WHOLE_SEQUENCE = -1


class LlamaCpp:
    """cache: GGML's name of the dtype of keys and values; llama.cpp's own default is F16."""

    def __init__(self, cache: str = "F16") -> None:
        import llama_cpp

        self.llama = llama_cpp
        self.cache = getattr(llama_cpp, f"GGML_TYPE_{cache}")
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()

    def load(self, path: str, threads: int, capacity_tokens: int) -> None:
        llama = self.llama
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = capacity_tokens
        parameters.n_batch = parameters.n_ubatch = CHUNK_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = self.cache
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ValueError(f"llama.cpp refuses a context of {capacity_tokens} tokens for {path}")
        self.memory = llama.llama_get_memory(self.context)

    def append(self, ids: Sequence[int]) -> Any:
        for begin in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[begin : begin + CHUNK_TOKENS]
            tokens = (self.llama.llama_token * len(chunk))(*chunk)
            self._decode(self.llama.llama_batch_get_one(tokens, len(chunk)))
        return np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

    def rewind(self, tokens: int) -> None:
        if not self.llama.llama_memory_seq_rm(self.memory, WHOLE_SEQUENCE, tokens, -1):
            raise ValueError(f"llama.cpp cannot go back to {tokens} tokens")

    def logits(self, ids: Sequence[int]) -> Array:
        self.rewind(0)
        found = []
        for begin in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[begin : begin + CHUNK_TOKENS]
            batch = self.llama.llama_batch_init(len(chunk), 0, 1)
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = token, begin + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            self._decode(batch)
            rows = self.llama.llama_get_logits(self.context)
            found.append(np.ctypeslib.as_array(rows, (len(chunk), self.vocab_size)).copy())
            self.llama.llama_batch_free(batch)
        return np.concatenate(found)

    def _decode(self, batch: Any) -> None:
        if code := self.llama.llama_decode(self.context, batch):
            raise ValueError(f"llama.cpp failed to decode: {code}")


def quantize(source: str, target: str, kind: str) -> None:
    """kind: ``Q8_0``, ``Q4_0`` or ``Q4_1``."""
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = 2
    if code := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp failed to quantize {source}: {code}")


if __name__ == "__main__":
    quantize(*sys.argv[1:]) if len(sys.argv) > 1 else serve(LlamaCpp)
