"""Who is timed against whom: a bundle in our runtime, or what else decodes one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pe_onnx.bundle import ENCODER, Bundle, read_bundle
from pe_onnx.errors import InputError
from pe_onnx.kv_cache import KVCache, make_cache
from pe_onnx.memory import available_bytes
from pe_onnx.session import Session
from pe_onnx.sources import Sources

STEP_TOKEN = 7
SEED = 0


class FirstToken(NamedTuple):
    """Seconds from a prompt to its first token."""

    total_s: float
    """A cache made, the prompt run, the most likely token chosen."""
    prefill_s: float
    """The prompt's run alone; of an encoder-decoder the source's encoder and the decoder's first run."""


class Contestant(Protocol):
    """One that continues a text token by token, with a cache."""

    name: str
    load_s: float

    def begin(self, depth_tokens: int) -> None:
        """Take up a text of ``depth_tokens`` tokens: every step continues it by one token, and forgets that again."""
        ...

    def step(self) -> None:
        """One decode step, to its logits."""
        ...

    def first_token(self, prompt: list[int]) -> FirstToken:
        """A new text. What ``begin`` took up is let go."""
        ...


class BundleContestant:
    """A bundle in our runtime, at batch 1.

    source: token ids for the encoder of an encoder-decoder; its prompts are sources then, and its texts are over
    ``source``. options: of the session, onnxruntime's. Raises what opening a bundle raises.
    """

    def __init__(
        self,
        folder: str | Path,
        provider: str = "cpu",
        threads: int = 0,
        source: list[int] | None = None,
        name: str | None = None,
        profile: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name or Path(folder).resolve().name
        begin = time.perf_counter()
        self.bundle = read_bundle(folder, verify=False)
        self.session = Session(self.bundle, provider, threads, options, profile=profile)
        crossed = self.bundle.crossing is not None
        self.encoder = Session(self.bundle, provider, threads, options, graph=ENCODER) if crossed else None
        self.load_s = time.perf_counter() - begin
        self.source = source
        self.cache: KVCache | None = None
        self._restore: Callable[[], None] = lambda: None

    def begin(self, depth_tokens: int) -> None:
        self.cache = None  # never two at once
        check_memory(self.bundle, depth_tokens + 1)
        self.cache = self._cache(depth_tokens + 1, self.source)
        self.cache.reserve(depth_tokens + 1)
        self._restore = self.cache.fill(depth_tokens, np.random.default_rng(SEED))

    def step(self) -> None:
        assert self.cache is not None
        self._restore()
        self.cache.decode([STEP_TOKEN])

    def first_token(self, prompt: list[int]) -> FirstToken:
        self.cache = None
        start = self.bundle.start_token or 0
        begin = time.perf_counter()
        if self.encoder is None:
            cache = self._cache(len(prompt), None)
            cache.reserve(len(prompt))
            made = time.perf_counter()
            logits = cache.prefill([prompt])[0]
        else:
            made = begin
            logits = self._cache(1, prompt).prefill([[start]])[0]
        ran = time.perf_counter()
        int(logits.argmax())
        return FirstToken(time.perf_counter() - begin, ran - made)

    def _cache(self, tokens: int, source: list[int] | None) -> KVCache:
        sources = None
        if self.encoder is not None:
            sources = Sources(self.encoder, self.session, [source or [STEP_TOKEN]])
        return make_cache(self.session, 1, tokens, sources=sources)


def check_memory(bundle: Bundle, tokens: int, option: str = "--depths") -> None:
    """Raises InputError for a cache of more bytes than there are; the portable target holds two at once."""
    needed = bundle.cache_bytes_per_token * tokens * (2 if bundle.target == "portable" else 1)
    free = available_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"a cache of {tokens} tokens takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give smaller "
            f"{option}"
        )


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """Token ids, the same at each call."""
    return np.random.default_rng(SEED).integers(0, vocab_size, count).tolist()
