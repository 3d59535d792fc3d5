"""Text from a bundle: ``load(DIR).generate("...")``. Imports neither torch nor transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np

from pe_onnx import saved_cache
from pe_onnx.beam_search import BeamOptions, BeamSearch, Hypothesis
from pe_onnx.bundle import ENCODER, Bundle, read_bundle
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import KVCache, make_cache
from pe_onnx.memory_plan import make_room
from pe_onnx.sampling import Sampler, SamplingOptions
from pe_onnx.session import Session
from pe_onnx.sources import Sources
from pe_onnx.tokenizer import TextStream, Tokenizer, load_tokenizer

Stream = Callable[[int, str], None]
"""Called with a row's index and the next piece of its text."""


@dataclass
class Generation:
    """What one prompt gave."""

    text: str
    tokens: list[int]
    """New tokens, the end-of-sequence token included where it was drawn."""
    prompt_tokens: int
    finish_reason: str
    """``stop`` (an end token or a stop string), or ``length``."""
    score: float | None = None
    """Of a beam search: log-probability / tokens ** length_penalty."""


@dataclass
class Timing:
    """Of one ``generate`` call, in seconds and tokens over all rows."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompt tokens those that the cache held already."""
    prefill_s: float = 0.0
    new_tokens: int = 0
    decoded_tokens: int = 0
    """Of the new tokens those that took a decode step: all but the first of each row, which the prefill gives. The
    beams of a row count once."""
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model ran on, in prefill and in decode steps."""
        return self.prompt_tokens - self.reused_tokens + self.decoded_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class _Row:
    """A row under way: its history, its text, and why it ended."""

    history: list[int]
    prompt_tokens: int
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Model:
    """A bundle open for generation.

    ``timing`` holds the last call's figures. Raises what ``Session`` and ``load_tokenizer`` raise.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int = 0, prepare: bool = True) -> None:
        self.bundle = bundle
        self.session = Session(bundle, provider, threads, prepare=prepare)
        self.encoder = None
        if bundle.crossing is not None:
            self.encoder = Session(bundle, provider, threads, graph=ENCODER, prepare=prepare)
        self.tokenizer: Tokenizer = load_tokenizer(bundle.folder, bundle.manifest["tokenizer"])
        self.timing = Timing()

    def cache(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> KVCache:
        """An empty cache, to call ``prefill`` and ``decode`` on, or to hand to ``generate`` again and again.

        sources: token ids for each row of an encoder-decoder, which are encoded now.
        """
        if sources is None or self.encoder is None:
            return make_cache(self.session, batch_size, max_length, chunk_tokens)
        encoded = Sources(self.encoder, self.session, sources)
        return make_cache(self.session, len(sources), max_length, chunk_tokens, encoded)

    def load_cache(
        self, path: str | PathLike[str], max_length: int | None = None, chunk_tokens: int | None = None
    ) -> KVCache:
        """A cache with what ``KVCache.save`` wrote, of as many rows.

        Raises CacheFileError for a file that is no cache of this bundle, InputError for more tokens than fit.
        """
        if self.encoder is not None:
            raise ConfigError("a cache of an encoder-decoder is over its sources; it is neither saved nor loaded")
        with saved_cache.opened(path, self.bundle) as saved:
            cache = self.cache(len(saved.tokens), max_length, chunk_tokens)
            cache.restore(saved)
        return cache

    def _open(self, prompts: list[list[int]], max_length: int | None) -> tuple[KVCache, list[list[int]]]:
        """A new cache for some prompts, and what it is to be prefilled with: for sources the start token."""
        if self.encoder is None:
            return self.cache(len(prompts), max_length), prompts
        start = self.bundle.start_token
        if start is None:
            raise ConfigError(f"bundle {self.bundle.folder} names no decoder_start_token_id, with which it would begin")
        return self.cache(max_length=max_length, sources=prompts), [[start]] * len(prompts)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        sampling: SamplingOptions | None = ...,
        *,
        stop: Sequence[str] = ...,
        stream: Stream | None = ...,
        cache: KVCache | None = ...,
        reuse: bool = ...,
        max_length: int | None = ...,
        max_memory_bytes: int | None = ...,
        ignore_eos: bool = ...,
        beams: None = ...,
    ) -> Generation: ...

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        sampling: SamplingOptions | None = ...,
        *,
        max_length: int | None = ...,
        max_memory_bytes: int | None = ...,
        ignore_eos: bool = ...,
        beams: BeamOptions,
    ) -> Generation | list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = ...,
        sampling: SamplingOptions | None = ...,
        *,
        stop: Sequence[str] = ...,
        stream: Stream | None = ...,
        cache: KVCache | None = ...,
        reuse: bool = ...,
        max_length: int | None = ...,
        max_memory_bytes: int | None = ...,
        ignore_eos: bool = ...,
        beams: BeamOptions | None = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: SamplingOptions | None = None,
        *,
        stop: Sequence[str] = (),
        stream: Stream | None = None,
        cache: KVCache | None = None,
        reuse: bool = False,
        max_length: int | None = None,
        max_memory_bytes: int | None = None,
        ignore_eos: bool = False,
        beams: BeamOptions | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or a batch of prompts of any lengths; of an encoder-decoder: answer sources.

        A prompt is text, or a list of token ids. sampling: default greedy. stop: strings that end the text before
        them. cache: continue on what it holds (its batch size must be the number of prompts); afterwards it holds
        the new tokens too, but for the last drawn. reuse: the prompts are whole, as of a conversation that grows, and
        what the cache holds of their beginnings is not computed again; where they depart, it is cut back.
        max_memory_bytes: of the whole process; prompts run in chunks so small that it suffices (memory_plan.py). beams:
        search with more than one beam; each prompt then gives ``num_return_sequences`` results, best first, and with
        more than one of them one prompt gives a list as well. A search neither draws nor streams, and takes no stop
        strings and no cache. Raises ConfigError for options that do not go together, and InputError for a prompt the
        model cannot take, or more tokens than fit the memory.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        prompts, single = self._prompts(prompt)
        options = sampling or SamplingOptions()
        ends = frozenset() if ignore_eos else self.tokenizer.eos_token_ids
        if beams is not None and beams.num_beams > 1:
            _check_beams(beams, options, stop, stream, cache)
            found = self._search(prompts, max_new_tokens, options, beams, max_length, max_memory_bytes, ends)
            return found[0] if single and len(found) == 1 else found
        if cache is not None and max_length is not None:
            raise ConfigError(f"max_length = {max_length} is for a new cache; the one given has its own")
        if reuse and cache is None:
            raise ConfigError("reuse = True needs a cache, which holds what was computed; make one with Model.cache()")
        if cache is not None and self.encoder is not None:
            raise ConfigError("cache: an encoder-decoder has one for each source, which generate makes")
        sampler = Sampler(options, len(prompts))
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))

        begin = time.perf_counter()
        first = prompts
        if cache is None:
            cache, first = self._open(prompts, max_length)
        elif reuse:
            first = [rest.tolist() for rest in cache.reuse(prompts)]
            self.timing.reused_tokens = int(cache.lengths.sum())
        rows = [
            _Row([*before, *ids], len(prompt), self._text(prompt, stop))
            for before, ids, prompt in zip(cache.tokens, first, prompts, strict=False)
        ]
        make_room(cache, max(len(row.history) for row in rows), max_new_tokens, max_memory_bytes)
        logits = np.stack(cache.prefill(first))
        self.timing.prefill_s = time.perf_counter() - begin
        begin = time.perf_counter()
        for step in range(max_new_tokens):
            tokens = sampler.sample(logits, [row.history for row in rows])
            for b, row in enumerate(rows):
                if row.finish_reason is None:
                    self._accept(b, row, int(tokens[b]), ends, stream)
                if cache.max_length is not None and cache.lengths[b] >= cache.max_length:
                    row.finish_reason = row.finish_reason or "length"
            active = np.array([row.finish_reason is None for row in rows])
            if not active.any() or step + 1 == max_new_tokens:
                break
            logits = cache.decode(tokens, active)
            self.timing.decoded_tokens += int(active.sum())
        self.timing.decode_s = time.perf_counter() - begin
        self.timing.new_tokens = sum(len(row.tokens) for row in rows)

        results = []
        for b, row in enumerate(rows):
            rest = row.text.finish()
            if rest and stream is not None:
                stream(b, rest)
            reason = row.finish_reason or "length"
            results.append(Generation(row.text.text, row.tokens, row.prompt_tokens, reason))
        return results[0] if single else results

    def _search(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        beams: BeamOptions,
        max_length: int | None,
        max_memory_bytes: int | None,
        ends: frozenset[int],
    ) -> list[Generation]:
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))
        begin = time.perf_counter()
        cache, first = self._open(prompts, max_length)
        make_room(cache, max(map(len, first)), max_new_tokens, max_memory_bytes, beams.num_beams)
        logits = np.stack(cache.prefill(first))
        self.timing.prefill_s = time.perf_counter() - begin
        begin = time.perf_counter()
        limits = [max_new_tokens] * len(prompts)
        if cache.max_length is not None:  # the token after the last that fits is still chosen
            limits = [min(max_new_tokens, cache.max_length - len(ids) + 1) for ids in first]
        search = BeamSearch(beams, first, limits, ends, repetition_penalty=options.repetition_penalty)
        self.timing.decoded_tokens = search_beams(search, cache, logits)
        self.timing.decode_s = time.perf_counter() - begin
        found = zip(prompts, search.finish(), strict=True)
        results = [self._generation(ids, hypothesis, ends) for ids, best in found for hypothesis in best]
        self.timing.new_tokens = sum(len(result.tokens) for result in results)
        return results

    def _generation(self, prompt: list[int], hypothesis: Hypothesis, ends: frozenset[int]) -> Generation:
        tokens, text = hypothesis.tokens, self._text(prompt)
        stopped = bool(tokens) and tokens[-1] in ends
        for token in tokens[:-1] if stopped else tokens:
            text.push(token)
        text.finish()
        return Generation(text.text, tokens, len(prompt), "stop" if stopped else "length", hypothesis.score)

    def _text(self, prompt: list[int], stop: Sequence[str] = ()) -> TextStream:
        """The text that continues a prompt, or answers a source."""
        return TextStream(self.tokenizer, stop, prompt=prompt if self.encoder is None else ())

    def _accept(self, b: int, row: _Row, token: int, ends: frozenset[int], stream: Stream | None) -> None:
        row.tokens.append(token)
        row.history.append(token)
        if token in ends:
            row.finish_reason = "stop"
            return
        piece = row.text.push(token)
        if piece and stream is not None:
            stream(b, piece)
        if row.text.stopped:
            row.finish_reason = "stop"

    def _prompts(
        self, prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], bool]:
        if isinstance(prompt, str):
            return [self.tokenizer.encode(prompt)], True
        if len(prompt) == 0:
            raise InputError("the prompt is empty; give text or at least one token id")
        if isinstance(prompt[0], int | np.integer):
            return [[int(t) for t in prompt]], True  # type: ignore[arg-type]
        return [self.tokenizer.encode(p) if isinstance(p, str) else [int(t) for t in p] for p in prompt], False  # type: ignore[union-attr]


def search_beams(search: BeamSearch, cache: KVCache, logits: np.ndarray[Any, Any]) -> int:
    """Run a search to its end.

    logits: float32 ``[B, V]``, what prefilling the cache's B rows with the prompts gave; the cache has B * num_beams
    rows afterwards. Returns the decode steps, summed over the prompts.
    """
    k, steps = search.options.num_beams, 0
    tokens, _ = search.step(logits)
    if not search.done:
        cache.expand(k)
    while not search.done:
        active = search.active
        steps += int(active.sum()) // k
        tokens, parents = search.step(cache.decode(tokens, active))
        cache.reorder(parents)
    return steps


def _check_beams(
    beams: BeamOptions, options: SamplingOptions, stop: Sequence[str], stream: Stream | None, cache: KVCache | None
) -> None:
    """Raises ConfigError for what a beam search does not go with."""
    with_beams = f"with num_beams = {beams.num_beams}"
    if options.temperature != 0:
        raise ConfigError(f"temperature = {options.temperature} {with_beams}: accepted is 0; beams are not drawn")
    if stream is not None:
        raise ConfigError(f"stream {with_beams}: which beam wins is known at the end only; stream with num_beams = 1")
    if stop:
        raise ConfigError(f"stop = {list(stop)!r} {with_beams}: beams end at end tokens only; stop with num_beams = 1")
    if cache is not None:
        raise ConfigError(f"cache {with_beams}: a beam search makes its own; give the whole prompt")


def load(
    folder: str | Path, provider: str = "cpu", threads: int = 0, verify: bool = True, prepare: bool = True
) -> Model:
    """Open a bundle for generation.

    verify: check every file's SHA-256 first. prepare: keep the optimised graph, and which files were checked, in a
    folder ``.prepared`` of the bundle, which makes later loads faster; False neither reads nor writes there, and
    checks every byte. The environment's PE_ONNX_PREPARE=0 does the same.

    Raises BundleError for a bundle that is missing or corrupted, ProviderError for a provider that cannot be had.
    """
    return Model(read_bundle(folder, verify, remembered=prepare), provider, threads, prepare)
