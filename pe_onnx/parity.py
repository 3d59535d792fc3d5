"""Parity: a bundle in onnxruntime against PyTorch on the same tokens, figures first, verdict second.

The reference is eager PyTorch, all tokens at once without a cache: our own decoder from its configuration and seed,
or transformers' own model from the checkpoint. Generated text is no evidence; logits decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import CheckpointError, ConfigError, InputError, did_you_mean
from pe_onnx.kv_cache import GrowingCache, KVCache, make_cache
from pe_onnx.kv_cache import Path as RunPath
from pe_onnx.session import Session
from pe_onnx.tolerance import TOLERANCES, Tolerance

Array = np.ndarray[Any, Any]
Reference = Callable[[Array], Array]
"""Token ids int64 ``[B, T]`` to float32 logits ``[B, T, V]``."""


class PathReference(Protocol):
    """A reference whose logits depend on the chunks in which a text is run."""

    def follow(self, path: RunPath) -> list[Array]:
        """The bundle's runs to each row's float32 logits ``[tokens, V]``."""
        ...


DEFAULT_TOKENS = 160
GREEDY_TOKENS = 64


@dataclass
class ModeResult:
    """One way of running the same tokens."""

    mode: str
    positions: int = 0
    """Positions compared."""
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    """max_abs_error over the spread of the reference's logits."""
    kl: float = 0.0
    """Mean Kullback-Leibler divergence of the bundle from the reference, nats."""
    top1_agreement: float = 1.0
    near_ties: int = 0
    """Disagreements between tokens that are nearly tied in the reference."""
    first_difference: str | None = None
    """The first row and position over the tolerance."""
    passed: bool = True


@dataclass
class ParityReport:
    """All modes, and the verdict."""

    bundle: str
    reference: str
    dtype: str
    tolerance: Tolerance
    spread: float
    modes: list[ModeResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(mode.passed for mode in self.modes)

    @property
    def relative_error(self) -> float:
        """The worst of all modes."""
        return max(mode.relative_error for mode in self.modes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite is None."""
        values = asdict(self)
        for mode in values["modes"]:
            mode.update({k: None for k, x in mode.items() if isinstance(x, float) and not np.isfinite(x)})
        return {**values, "tolerance": self.tolerance._asdict(), "passed": self.passed}


class Pair(NamedTuple):
    """The bundle's logits ``[V]`` after token ``position`` of ``row``, which is row ``slot`` of the cache."""

    row: int
    position: int
    logits: Array
    cache: KVCache
    slot: int


def check_parity(
    folder: str | Path,
    reference: Reference | PathReference | str | Path | Any | None = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    tokens: int = DEFAULT_TOKENS,
    modes: Sequence[str] | None = None,
    provider: str = "cpu",
    tolerance: float | None = None,
    seed: int = 0,
    threads: int = 0,
) -> ParityReport:
    """Run the bundle in every mode against PyTorch.

    reference: None for the one the manifest names; a checkpoint's path; a ``torch.nn.Module`` called with
    ``(input_ids, attention_mask, position_ids)``; any function of token ids; or a PathReference. rows: token ids to
    compare on (default: four random rows of ``tokens`` tokens, at most what the encoding takes). tolerance: of the
    relative error, in place of the dtype's. Raises CheckpointError where the reference cannot be had.
    """
    bundle = read_bundle(folder)
    if tokens < 2:
        raise ConfigError(f"length = {tokens} must be at least 2 tokens")
    if seed < 0 or (tolerance is not None and not tolerance >= 0):
        raise ConfigError(f"seed = {seed} and tolerance = {tolerance} must be at least 0")
    limit = min(tokens, bundle.max_length or tokens)
    if rows is None:
        rng = np.random.default_rng(seed)
        rows = [rng.integers(0, bundle.shape["vocab_size"], limit).tolist() for _ in range(4)]
    arrays = [np.asarray(row, np.int64) for row in rows]
    for row in arrays:
        if row.size < 2:
            raise InputError("parity needs rows of at least 2 tokens")
        if bundle.max_length is not None and row.size > bundle.max_length:
            raise InputError(f"{row.size} tokens are more than the {bundle.max_length} positions of the encoding")
        if row.min() < 0 or row.max() >= bundle.shape["vocab_size"]:
            raise InputError(f"token ids {row.min()}..{row.max()} must be in 0..{bundle.shape['vocab_size'] - 1}")
    if not arrays:
        raise InputError("parity needs at least one row of tokens")
    wanted = list(modes or _modes(bundle))
    known = [*MODES, GREEDY]
    for mode in wanted:
        if mode not in known:
            raise ConfigError(f"unknown mode {mode!r}{did_you_mean(mode, known)} (known: {', '.join(known)})")
    compute, name = resolve_reference(bundle, reference)
    session = Session(bundle, provider, threads)
    allowed = TOLERANCES[bundle.manifest["dtype"]]
    if tolerance is not None:
        allowed = allowed._replace(error=tolerance)
    expected = _Expected(compute, arrays, bundle.shape["vocab_size"])
    report = ParityReport(str(folder), name, bundle.manifest["dtype"], allowed, expected.spread)
    for mode in wanted:
        if mode == GREEDY:
            report.modes.append(_greedy(session, arrays, expected, allowed))
        else:
            report.modes.append(_compare(mode, MODES[mode](session, arrays), expected, allowed))
    return report


class _Expected:
    """The reference's logits: of every row, computed once, or along the paths of the bundle's caches."""

    def __init__(self, reference: Reference | PathReference, rows: list[Array], vocab_size: int) -> None:
        self.reference = reference
        width = self.at_once(np.zeros(1, np.int64)).shape[-1]
        if width != vocab_size:
            raise CheckpointError(f"the reference has a vocabulary of {width}, the bundle of {vocab_size}")
        self.logits = [self.at_once(row) for row in rows]
        self.spread = float(np.concatenate([x.reshape(-1) for x in self.logits]).std())

    def at_once(self, row: Array) -> Array:
        """``[T]`` to ``[T, V]``, all tokens in one run."""
        if callable(self.reference):
            return self.reference(row[None])[0]
        return self.reference.follow([{0: row}])[0]

    def along(self, cache: KVCache, row: Array) -> Array:
        """The logits ``[T, V]`` of the tokens in a cache of one row, run as they were."""
        if callable(self.reference):
            return self.at_once(row)
        return self.reference.follow(cache.path or [])[0]

    def join(self, pairs: Iterator[Pair]) -> Iterator[tuple[Pair, Array]]:
        """Each pair with what is expected of it."""
        if callable(self.reference):
            yield from ((pair, self.logits[pair.row][pair.position]) for pair in pairs)
            return
        held = [pair._replace(logits=pair.logits.copy()) for pair in pairs]
        caches = {id(pair.cache): pair.cache for pair in held}
        followed = {key: self.reference.follow(cache.path or []) for key, cache in caches.items()}
        yield from ((pair, followed[id(pair.cache)][pair.slot][pair.position]) for pair in held)


class _Account:
    """Adds up one mode's figures position by position."""

    def __init__(self, mode: str, spread: float, allowed: Tolerance) -> None:
        self.result = ModeResult(mode)
        self.spread = spread
        self.allowed = allowed
        self.agreed = 0
        self.divergence = 0.0

    def add(self, where: str, expected: Array, logits: Array) -> None:
        result = self.result
        want, have = expected.astype(np.float64), logits.astype(np.float64)
        error = float(np.abs(have - want).max()) if np.isfinite(have).all() else float("inf")
        best, chosen = int(want.argmax()), int(have.argmax())
        near = best != chosen and want[best] - want[chosen] <= self.allowed.near_tie * self.spread
        same = best == chosen or near
        result.positions += 1
        result.max_abs_error = max(result.max_abs_error, error)
        result.near_ties += near
        self.agreed += same
        log_p, log_q = _log_softmax(want), _log_softmax(have)
        self.divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        if result.first_difference is None and error > self.allowed.error * self.spread:
            result.first_difference = where

    def finish(self) -> ModeResult:
        result = self.result
        result.relative_error = result.max_abs_error / self.spread
        result.kl = self.divergence / result.positions
        result.top1_agreement = self.agreed / result.positions
        result.passed = result.relative_error <= self.allowed.error and result.top1_agreement >= self.allowed.top1
        return result


def _compare(mode: str, pairs: Iterator[Pair], expected: _Expected, allowed: Tolerance) -> ModeResult:
    account = _Account(mode, expected.spread, allowed)
    for pair, want in expected.join(pairs):
        account.add(f"row {pair.row}, position {pair.position}", want, pair.logits)
    return account.finish()


def _recorded(*args: Any) -> KVCache:
    """A cache that notes its runs."""
    cache = make_cache(*args)
    cache.path = []
    return cache


def _greedy(session: Session, rows: list[Array], expected: _Expected, allowed: Tolerance) -> ModeResult:
    """Greedy tokens from the first half of a row; each must be the reference's choice, given those before it."""
    account = _Account("greedy", expected.spread, allowed)
    limit = session.bundle.max_length
    for b, row in enumerate(rows):
        prompt = row[: max(row.size // 2, 1)].tolist()
        count = min(GREEDY_TOKENS, (limit or len(prompt) + GREEDY_TOKENS) - len(prompt))
        cache = _recorded(session, 1, len(prompt) + count)
        logits = [cache.prefill([prompt])[0].copy()]
        made = [int(logits[0].argmax())]
        while len(made) < count:
            logits.append(cache.decode([made[-1]])[0].copy())
            made.append(int(logits[-1].argmax()))
        want = expected.along(cache, np.array(prompt + made[:-1], np.int64))[len(prompt) - 1 :]
        for i, have in enumerate(logits):
            account.add(f"row {b}, new token {i}", want[i], have)
    return account.finish()


def _whole(session: Session, rows: list[Array]) -> Iterator[Pair]:
    """Each row in one run, at full length and at odd shorter ones; every position where the bundle gives all."""
    for b, row in enumerate(rows):
        for n in sorted({1, 2, row.size // 3 | 1, row.size}):
            yield from _prefilled(session, row[:n], b, row.size)


def _chunks(session: Session, rows: list[Array]) -> Iterator[Pair]:
    """Each row in chunks of 13 tokens."""
    for b, row in enumerate(rows):
        for n in sorted({row.size // 2, row.size}):
            yield from _prefilled(session, row[:n], b, 13)


def _prefilled(session: Session, tokens: Array, row: int, chunk: int) -> Iterator[Pair]:
    every = session.bundle.logits == "all"
    cache = _recorded(session, 1, tokens.size, chunk)
    logits = cache.prefill([tokens.tolist()], all_logits=every)[0]
    if every:
        yield from (Pair(row, i, x, cache, 0) for i, x in enumerate(logits))
    else:
        yield Pair(row, tokens.size - 1, logits, cache, 0)


def _steps(session: Session, rows: list[Array]) -> Iterator[Pair]:
    """The first row token by token from an empty cache."""
    cache = _recorded(session, 1, rows[0].size)
    for i, token in enumerate(rows[0]):
        yield Pair(0, i, cache.decode([int(token)])[0], cache, 0)


def _ragged(session: Session, rows: list[Array]) -> Iterator[Pair]:
    """All rows in one batch with prompts of different lengths, then steps, then a second prompt each."""
    cache = _recorded(session, len(rows), max(row.size for row in rows), 64)
    first = [max(1, row.size * (1 + 3 * (b % 3)) // 8) for b, row in enumerate(rows)]  # 1/8, 4/8, 7/8
    for b, logits in enumerate(cache.prefill([row[:n].tolist() for row, n in zip(rows, first, strict=True)])):
        yield Pair(b, first[b] - 1, logits, cache, b)
    at = first
    for _ in range(8):
        if any(n >= row.size for row, n in zip(rows, at, strict=True)):
            return
        logits = cache.decode([int(row[n]) for row, n in zip(rows, at, strict=True)])
        yield from (Pair(b, n, logits[b], cache, b) for b, n in enumerate(at))
        at = [n + 1 for n in at]
    ends = [min(row.size, n + 1 + 4 * b) for b, (row, n) in enumerate(zip(rows, at, strict=True))]
    if any(end <= n for end, n in zip(ends, at, strict=True)):
        return
    second = [row[n:end].tolist() for row, n, end in zip(rows, at, ends, strict=True)]
    for b, logits_b in enumerate(cache.prefill(second)):
        yield Pair(b, ends[b] - 1, logits_b, cache, b)


def _padded(session: Session, rows: list[Array], side: str) -> Iterator[Pair]:
    """A batch with zeros in the mask on one side, or everywhere; then steps."""
    cache = _recorded(session, len(rows), max(row.size for row in rows))
    if not isinstance(cache, GrowingCache):
        raise ConfigError(f"mode {side}_padding is for the portable target; ort takes compact rows only")
    longest = max(row.size for row in rows)
    used = [max(1, row.size // 2 - 5 * b) for b, row in enumerate(rows)]
    rng = np.random.default_rng(1)
    ids, valid = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for b, (row, n) in enumerate(zip(rows, used, strict=True)):
        slots = {
            "left": np.arange(longest - n, longest),
            "right": np.arange(n),
            "interior": np.sort(rng.choice(longest, n, replace=False)),
        }[side]
        ids[b, slots], valid[b, slots] = row[:n], 1
    logits = cache.run(ids, valid)
    for b, n in enumerate(used):
        slots = np.flatnonzero(valid[b])
        if session.bundle.logits == "all":
            yield from (Pair(b, i, logits[b, slot], cache, b) for i, slot in enumerate(slots))
        else:
            yield Pair(b, n - 1, logits[b, 0], cache, b)
    for k in range(min(5, *(row.size - n for row, n in zip(rows, used, strict=True)))):
        step = cache.decode([int(row[n + k]) for row, n in zip(rows, used, strict=True)])
        yield from (Pair(b, n + k, step[b], cache, b) for b, n in enumerate(used))


def _left_padding(session: Session, rows: list[Array]) -> Iterator[Pair]:
    return _padded(session, rows, "left")


def _right_padding(session: Session, rows: list[Array]) -> Iterator[Pair]:
    return _padded(session, rows, "right")


def _interior_padding(session: Session, rows: list[Array]) -> Iterator[Pair]:
    return _padded(session, rows, "interior")


MODES: dict[str, Callable[[Session, list[Array]], Iterator[Pair]]] = {
    "whole": _whole,
    "chunks": _chunks,
    "steps": _steps,
    "ragged": _ragged,
    "left_padding": _left_padding,
    "right_padding": _right_padding,
    "interior_padding": _interior_padding,
}
GREEDY = "greedy"
"""The mode that makes its own tokens."""


def _modes(bundle: Bundle) -> list[str]:
    """The modes that a target allows."""
    return [m for m in (*MODES, GREEDY) if bundle.target == "portable" or not m.endswith("_padding")]


def resolve_reference(bundle: Bundle, reference: Any = None) -> tuple[Reference | PathReference, str]:
    """The PyTorch side as a function of token ids or of the bundle's runs, and its name."""
    from pe_onnx import reference as references

    if reference is None:
        return references.from_manifest(bundle.manifest)
    if isinstance(reference, str | Path):
        return references.from_checkpoint(Path(reference)), f"transformers, {reference}"
    if references.is_module(reference):
        return references.from_module(reference), type(reference).__name__
    if callable(reference) or hasattr(reference, "follow"):
        return reference, getattr(reference, "__name__", "a function")
    raise CheckpointError(f"reference = {reference!r} must be a checkpoint's path, a module or a function")


def _log_softmax(x: Array) -> Array:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
