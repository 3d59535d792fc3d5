"""What a request takes of memory, before anything runs: chosen so that it fits a budget, or refused.

Counted are

- the process as it stands: weights, onnxruntime, Python; and OVERHEAD_BYTES;
- keys and values of all rows up to the last token that may be made; the portable target's GROWING times, as each run
  returns a longer cache beside the one it was given and onnxruntime's allocator keeps what is too short for the next;
- a run on a chunk of T tokens in b rows behind the rest of S: some tensors ``[b, H, T, S]`` where attention has such
  (a bias, scores that are written out), the logits, and activations of about ACTIVATIONS x width numbers a token, the
  width being that of a decoder of so many weights.

How many such tensors there are, GROWING and OVERHEAD_BYTES were measured, and the activations are an estimate; the
rest is exact. The chunk is the longest that fits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

from pe_onnx import contract
from pe_onnx.cached_rows import CHUNK_TOKENS, LEAST_CHUNK_TOKENS, SCORE_BYTES, KVCache
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.fresh_process import status_bytes
from pe_onnx.kv_cache import ring_slots
from pe_onnx.memory import available_bytes
from pe_onnx.session import Session

SCORE_TENSORS = {"ort": 2.5, "portable": 4.5}
"""Of ``[b, H, T, S]`` at once: a bias, the scores under it, and what they are made of."""
ACTIVATIONS = 32
"""Numbers of a layer's width that a token takes within a run: residual, queries, keys, values, the MLP."""
FEWEST_CHUNK_TOKENS = 16
"""Fewer at a time would take longer than decode steps."""
GROWING = 5.5
"""Caches of the portable target at once."""
OVERHEAD_BYTES = 8_000_000


class Demand(NamedTuple):
    """Bytes of a request."""

    cache: int
    run: int

    @property
    def total(self) -> int:
        return self.cache + self.run


def demand(session: Session, rows: int, prompt_tokens: int, tokens: int, chunk_tokens: int) -> Demand:
    """Of ``rows`` prompts, run in chunks, that grow to ``tokens`` tokens each. Without the process itself."""
    bundle = session.bundle
    itemsize, portable = contract.storage_dtype(bundle.cache_dtype).itemsize, bundle.target == "portable"
    cache = sum(
        2 * itemsize * K * D * (ring_slots(window) if window else tokens)
        for (K, D), window in zip(session.caches, bundle.windows, strict=True)
    )
    chunk = min(chunk_tokens, prompt_tokens)
    together = portable or (prompt_tokens <= chunk_tokens and not any(bundle.windows))
    new = max(chunk * rows if together else chunk, rows)  # tokens of one run
    logits = 8 * max(rows, new if bundle.logits == "all" else 0) * bundle.shape["vocab_size"]  # ours and onnxruntime's
    weights = bundle.manifest["graph"]["weight_bytes"] / itemsize
    width = math.sqrt(max(weights, 1) / len(bundle.caches) / 12)
    heads = max(session.score_heads, *(K for K, _ in session.caches)) if portable else session.score_heads
    row_scores = 4 * heads * tokens
    scores = row_scores * new
    if not bundle.path_dependent:  # chunks are made smaller behind a long past
        scores = min(scores, max(SCORE_BYTES, row_scores * max(min(chunk, LEAST_CHUNK_TOKENS) * (new // chunk), rows)))
    run = logits + round(4 * ACTIVATIONS * width * new + SCORE_TENSORS[bundle.target] * scores)
    return Demand(round(rows * cache * (GROWING if portable else 1)), run)


def fit(cache: KVCache, prompt_tokens: int, new_tokens: int, max_memory_bytes: int, copies: int = 1) -> None:
    """Set the cache's chunks so that rows of ``prompt_tokens`` tokens at most, and ``new_tokens`` more, fit a budget.

    copies: rows that are made of each, as beams. Raises InputError, with how many tokens would fit, where they do not.
    """
    session = cache.session
    bundle = session.bundle
    if cache.sources is not None:
        raise ConfigError(f"max_memory_bytes = {max_memory_bytes} is for decoders; this is an encoder-decoder")
    rows = cache.batch_size * copies
    held = int(cache.lengths.sum()) * session.cache_bytes_per_token
    process = max((status_bytes("VmRSS") or 0) - held, bundle.manifest["graph"]["weight_bytes"]) + OVERHEAD_BYTES
    left = max_memory_bytes - process
    wanted = prompt_tokens + new_tokens - 1  # the last token drawn is never run
    if cache.max_length is not None:
        wanted = max(min(wanted, cache.max_length), prompt_tokens)
    least = prompt_tokens if bundle.path_dependent else min(FEWEST_CHUNK_TOKENS, cache.chunk_tokens)
    if demand(session, rows, prompt_tokens, wanted, least).total > left:
        fitting = _most_tokens(session, rows, left, None if bundle.path_dependent else least)
        needed = process + demand(session, rows, prompt_tokens, wanted, least).total
        raise InputError(
            f"{rows} x {wanted} tokens take about {_mb(needed)} MB, {_mb(process)} of them the loaded model, and "
            f"max_memory is {_mb(max_memory_bytes)} MB: {rows} x {fitting} tokens, prompt and new ones, would fit"
        )
    if bundle.path_dependent:
        return  # a prompt is one run
    cache.score_heads = session.score_heads
    chunk = min(CHUNK_TOKENS, cache.chunk_tokens)
    while chunk > least and demand(session, rows, prompt_tokens, wanted, chunk).total > left:
        chunk = max(chunk // 2, least)
    cache.chunk_tokens = chunk


def make_room(
    cache: KVCache, prompt_tokens: int, new_tokens: int, max_memory_bytes: int | None, copies: int = 1
) -> None:
    """Reserve an empty cache for rows that are known, rather than let it double; within a budget where one is given.

    prompt_tokens: of the longest row, with what the cache holds of it. Raises what ``fit`` raises.
    """
    if max_memory_bytes is not None:
        fit(cache, prompt_tokens, new_tokens, max_memory_bytes, copies)
    limit = cache.max_length or sys.maxsize
    tokens, free = min(prompt_tokens + new_tokens - 1, limit), available_bytes()
    needed = cache.batch_size * tokens * cache.session.cache_bytes_per_token
    if prompt_tokens <= limit and (free is None or needed < free):
        cache.reserve(tokens)


def _most_tokens(session: Session, rows: int, left: int, chunk_tokens: int | None) -> int:
    """How many tokens a row may have for its demand to be ``left`` bytes; chunks of all of them for None."""
    return most_fitting(lambda n: demand(session, rows, n, n, chunk_tokens or n).total <= left, 1 << 40)


def most_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The greatest number up to ``most`` that fits, where all smaller ones do; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"
