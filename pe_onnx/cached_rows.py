"""What every KV cache is to its user: rows of tokens, ``prefill`` to append prompts, ``decode`` for a token a row."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from pe_onnx import contract, saved_cache
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.reordering import checked_parents, common_prefix
from pe_onnx.session import Session
from pe_onnx.sources import Sources

Tokens = Sequence[int]
Array = np.ndarray[Any, Any]

CHUNK_TOKENS = 256
"""Prompt tokens of one run: enough to fill the cores."""

CUDA_CHUNK_TOKENS = 4096
"""Likewise on a CUDA device."""

LEAST_CHUNK_TOKENS = 64
"""Fewer leave the cores idle."""

SCORE_BYTES = 32 << 20
"""Of one tensor [H, T, S], the scores or their bias, where a run holds such: the longer S, the fewer tokens T."""

CUDA_SCORE_BYTES = 1 << 30
"""Likewise on a CUDA device."""

Path = list[dict[int, Array]]
"""Runs of the graph in order; each maps the rows that took part to the tokens int64 ``[n]`` they appended."""


class Feed(NamedTuple):
    """What one run of the graph was given, but for keys and values."""

    row: int
    """The first of the rows that took part."""
    inputs: dict[str, Array]
    """Tokens, mask and positions by name, int64; ``input_ids`` is ``[b, T]``."""
    valid: Array
    """bool ``[b, T]``: the new tokens that are no padding."""


class KVCache(ABC):
    """The cache of ``batch_size`` rows. ``lengths``: int64 ``[B]``, the tokens each row holds.

    max_length: tokens a row may hold; default the trained length. chunk_tokens: prompt tokens of one run; default
    CHUNK_TOKENS, fewer where tensors [H, T, S] would outgrow SCORE_BYTES, on a CUDA device CUDA_CHUNK_TOKENS and
    CUDA_SCORE_BYTES, or the whole prompt where the encoding's frequencies depend on how far a run reaches. sources: one
    for each row of an encoder-decoder. Raises ConfigError for more than the encoding takes.
    """

    def __init__(
        self,
        session: Session,
        batch_size: int = 1,
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        sources: Sources | None = None,
    ) -> None:
        bundle = session.bundle
        if (bundle.crossing is None) != (sources is None):
            raise ConfigError("a cache of an encoder-decoder, and of no other, is over sources: cache(sources=...)")
        if sources is not None and len(sources.lengths) != batch_size:
            raise ConfigError(f"{len(sources.lengths)} sources for a cache of {batch_size} rows")
        self.score_heads = 0 if chunk_tokens or bundle.path_dependent else session.score_heads
        if chunk_tokens is None:
            usual = CUDA_CHUNK_TOKENS if session.device.kind == "cuda" else CHUNK_TOKENS
            chunk_tokens = sys.maxsize if bundle.path_dependent else usual
        hard = session.max_length
        if max_length is not None and hard is not None and max_length > hard:
            raise ConfigError(f"max_length = {max_length} is more than the {hard} positions of the encoding")
        if batch_size < 1 or chunk_tokens < 1 or (max_length is not None and max_length < 1):
            raise ConfigError(
                f"batch_size = {batch_size}, chunk_tokens = {chunk_tokens} and max_length = {max_length} must be at "
                f"least 1"
            )
        self.session = session
        self.batch_size = batch_size
        self.chunk_tokens = chunk_tokens
        self.max_length = max_length or bundle.trained_length or hard
        self.vocab_size = bundle.shape["vocab_size"]
        self.layers = len(bundle.caches)
        self.dtype = bundle.cache_dtype
        self.sources = sources
        part = "" if sources is None else "decoder."
        self.past_names = contract.past_names(self.layers, part)
        self.present_names = contract.present_names(self.layers, part)
        self.lengths = np.zeros(batch_size, np.int64)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        """What each row holds."""
        self.path: Path | None = None
        """Where a list is put here, each run of the graph is noted in it."""
        self.feeds: list[Feed] | None = None
        """Likewise, with all that the graph was given."""

    def prefill(self, rows: Sequence[Tokens], all_logits: bool = False) -> list[Array]:
        """Append each row's tokens, in chunks; at least one token a row.

        Returns for each row float32 ``[V]``, the logits of its last token; with ``all_logits`` ``[tokens, V]``, for
        bundles exported with logits ``all``. Raises InputError for an id out of range or a row that grows too long.
        """
        if len(rows) != self.batch_size:
            raise InputError(f"{len(rows)} prompts for a cache of {self.batch_size} rows")
        if all_logits and self.session.bundle.logits != "all":
            raise ConfigError("the bundle gives the logits of the last token; export it with --logits all")
        arrays = [self._checked(row, int(length)) for row, length in zip(rows, self.lengths, strict=True)]
        logits = self._prefill(arrays, all_logits)
        for held, row in zip(self.tokens, arrays, strict=True):
            held.extend(row.tolist())
        return logits

    def decode(self, tokens: Sequence[int] | Array, active: Array | None = None) -> Array:
        """Append one token a row and return the logits, float32 ``[B, V]``, valid until the next call.

        active: bool ``[B]``; a row that is not keeps its length, and its logits mean nothing.
        """
        ids = _as_ids(tokens, self.vocab_size)
        if ids.size != self.batch_size:
            raise InputError(f"{ids.size} tokens for a cache of {self.batch_size} rows")
        moving = np.ones(self.batch_size, bool) if active is None else active
        self._check_length(int(self.lengths.max(initial=0, where=moving)) + 1)
        logits = self._decode(ids, moving)
        self.lengths += moving
        for b in np.flatnonzero(moving):
            self.tokens[b].append(int(ids[b]))
        return logits

    def expand(self, copies: int) -> None:
        """Make of each row b ``copies`` rows, from ``b * copies`` on."""
        self._take(np.repeat(np.arange(self.batch_size), copies))

    def reorder(self, parents: Sequence[int] | Array) -> int:
        """Make each row b what row ``parents[b]`` was, and return the bytes of keys and values that moved.

        parents: int64 ``[B]``, any row as often as wanted. Raises InputError for what names no rows.
        """
        return self._take(checked_parents(parents, self.batch_size))

    def _take(self, parents: Array) -> int:
        if self.path is not None:
            raise ConfigError("a cache whose runs are noted in a path cannot exchange its rows")
        if self.sources is None:
            moved = self._take_rows(parents)
        elif len(parents) != self.batch_size:  # new buffers are bound with those of the sources
            self.sources.take(parents)
            moved = self._take_rows(parents)
        else:  # which keys two rows share depends on the sources they have had
            moved = self._take_rows(parents)
            if self.sources.take(parents):
                self._bind()
        self.lengths = self.lengths[parents]
        self.tokens = [self.tokens[p] if b == p else list(self.tokens[p]) for b, p in enumerate(parents)]
        self.batch_size = len(parents)
        return moved

    def truncate(self, lengths: Sequence[int] | Array) -> None:
        """Forget what each row b holds behind its first ``lengths[b]`` tokens.

        Raises InputError for what is no length of the rows, or for one to which a row cannot go back.
        """
        kept = np.asarray(lengths, np.int64)
        if kept.shape != (self.batch_size,) or (kept < 0).any() or (kept > self.lengths).any():
            raise InputError(f"lengths = {kept.tolist()} must be one a row, at most {self.lengths.tolist()}")
        if self.path is not None and (kept < self.lengths).any():
            raise ConfigError("a cache whose runs are noted in a path cannot forget tokens")
        for b, n in enumerate(kept):
            if not self._can_keep(b, int(n)):
                raise InputError(
                    f"row {b} cannot go back from {self.lengths[b]} tokens to {n}: its keys depend on all tokens of "
                    f"their run, or those before are out of the window; truncate it to 0"
                )
        if (kept < self.lengths).any():
            self._truncate(kept)
            self.lengths[:] = kept
            for held, n in zip(self.tokens, kept, strict=True):
                del held[n:]

    def reuse(self, prompts: Sequence[Tokens]) -> list[Array]:
        """Cut each row back to what it has in common with the beginning of its prompt, and return the rest of each
        prompt, one token at least, to ``prefill``.

        Rows go back to nothing where they cannot be cut so far, or where keys depend on the runs that made them: the
        logits are those of the prompts from scratch. Raises InputError for prompts that the cache cannot take.
        """
        if len(prompts) != self.batch_size:
            raise InputError(f"{len(prompts)} prompts for a cache of {self.batch_size} rows")
        if self.sources is not None:
            raise ConfigError("a cache of an encoder-decoder answers one source each: there is no prompt to reuse")
        arrays = [self._checked(prompt, 0) for prompt in prompts]
        kept = [self._common(b, prompt.tolist()) for b, prompt in enumerate(arrays)]
        self.truncate(kept)
        return [prompt[n:] for prompt, n in zip(arrays, kept, strict=True)]

    def _common(self, b: int, prompt: list[int]) -> int:
        if self.session.bundle.path_dependent:
            return 0
        n = min(common_prefix(self.tokens[b], prompt), len(prompt) - 1)
        return n if self._can_keep(b, n) else 0

    def _can_keep(self, b: int, tokens: int) -> bool:
        """Whether row b, cut back to its first tokens, would be what it was when it had but them."""
        return tokens in (0, self.lengths[b]) or not self.session.bundle.path_dependent

    def save(self, path: str | PathLike[str]) -> None:
        """Write what the rows hold to a file that ``Model.load_cache`` reads: tokens in use only, in safetensors'
        format. Raises ConfigError for an encoder-decoder, CacheFileError where the file cannot be written.
        """
        if self.sources is not None:
            raise ConfigError("a cache of an encoder-decoder is over its sources and cannot be saved")
        held = (self._held(i) for i in range(2 * self.layers))
        saved_cache.write(path, self.session.bundle, self.tokens, held)

    def restore(self, saved: saved_cache.Saved) -> None:
        """Take what ``save`` wrote into an empty cache of as many rows. Raises InputError for more tokens than fit."""
        lengths = np.array([len(row) for row in saved.tokens], np.int64)
        if len(lengths) != self.batch_size or self.lengths.any():
            raise InputError(f"{len(lengths)} saved rows for a cache of {self.batch_size} rows, which must be empty")
        self._check_length(int(lengths.max()))
        self._hold(lengths, saved.values())
        self.lengths[:], self.tokens = lengths, saved.tokens

    def fill(self, tokens: int, rng: np.random.Generator) -> Callable[[], None]:
        """Random keys and values in ``tokens`` slots of every row of an empty cache, for measuring: what a step costs
        does not depend on their values. Returns a function that takes the cache back to this state after steps.

        Raises InputError for more tokens than a row may hold.
        """
        self._check_length(tokens)
        back = self._fill(tokens, rng)
        held = [[0] * tokens for _ in range(self.batch_size)]

        def restore() -> None:
            back()
            self.lengths[:] = tokens
            for b, row in enumerate(held):
                del self.tokens[b][tokens:]
                if len(self.tokens[b]) < tokens:
                    self.tokens[b] = list(row)

        restore()
        return restore

    def reserve(self, tokens: int) -> None:  # noqa: B027
        """Make room for ``tokens`` a row ahead of time, where the cache is preallocated."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held."""

    def _note(self, row: int, ids: Array, mask: Array, positions: Array, valid: Array) -> None:
        """Note a run of rows from ``row`` on. ids, positions int64 and valid bool ``[b, T]``, mask ``[b, total]``."""
        if self.path is not None:
            self.path.append({row + int(i): ids[i, valid[i]] for i in np.flatnonzero(valid.any(1))})
        if self.feeds is not None:
            named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            inputs = {name: values.copy() for name, values in named.items() if name in self.session.inputs}
            self.feeds.append(Feed(row, inputs, valid.copy()))

    def _bind(self) -> None:  # noqa: B027
        """Bind anew what every step is bound to."""

    @abstractmethod
    def _take_rows(self, parents: Array) -> int:
        """Keys and values of row b become those of row ``parents[b]``; there may be more rows then. Returns bytes."""

    @abstractmethod
    def _truncate(self, lengths: Array) -> None:
        """Drop keys and values behind ``lengths``; some of them are less than what the rows hold."""

    @abstractmethod
    def _held(self, i: int) -> list[Array]:
        """Of each row what the i-th of the past tensors holds, ``[K, tokens, D]``."""

    @abstractmethod
    def _hold(self, lengths: Array, held: Iterable[list[Array]]) -> None:
        """Replace keys and values by rows of ``lengths`` tokens: past tensor after past tensor, as ``_held`` gives
        them."""

    @abstractmethod
    def _fill(self, tokens: int, rng: np.random.Generator) -> Callable[[], None]:
        """Random keys and values in the first slots; a function that puts back what a step replaces."""

    @abstractmethod
    def _prefill(self, rows: list[Array], all_logits: bool) -> list[Array]: ...

    @abstractmethod
    def _decode(self, ids: Array, moving: Array) -> Array: ...

    def _chunk_after(self, past: int, rows: int = 1) -> int:
        """Tokens of the next run of a prompt, in ``rows`` rows behind ``past`` tokens."""
        if not self.score_heads:
            return self.chunk_tokens
        room = CUDA_SCORE_BYTES if self.session.device.kind == "cuda" else SCORE_BYTES
        fitting = room // (4 * rows * self.score_heads * (past + self.chunk_tokens))
        return min(self.chunk_tokens, max(fitting, LEAST_CHUNK_TOKENS))

    def _checked(self, row: Tokens, length: int) -> Array:
        ids = _as_ids(row, self.vocab_size)
        if ids.size == 0:
            raise InputError("a prompt has no tokens; give at least one")
        self._check_length(length + ids.size)
        return ids

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            hard = self.session.max_length
            if hard is not None and self.max_length >= hard:
                raise InputError(f"{length} tokens are more than the {hard} positions of the encoding")
            raise InputError(
                f"{length} tokens are more than max_length = {self.max_length}; give a greater --max-length"
            )


def _as_ids(tokens: Tokens | Array, vocab_size: int) -> Array:
    """int64 ``[n]``. Raises InputError for what is no list of integers in the vocabulary."""
    try:
        if np.asarray(tokens).dtype.kind == "f" and len(tokens):
            raise ValueError
        ids = np.asarray(tokens, np.int64).reshape(-1)
    except (OverflowError, ValueError, TypeError):
        wrong = next((t for t in tokens if not isinstance(t, int) or not -(2**63) <= t < 2**63), tokens)
        raise InputError(f"token id {wrong!r} must be an integer of 64 bits") from None
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} must be in 0..{vocab_size - 1}")
    return ids
