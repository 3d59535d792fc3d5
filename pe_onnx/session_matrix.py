"""Sessions of one bundle against each other: providers, levels of optimisation, threads.

PyTorch is not asked: the same tokens go through each session, a ragged prompt and single steps through the KV cache,
and every pair of sessions is compared. What a provider has no kernel for runs on the CPU, which onnxruntime does not
say by itself: such nodes are listed.
"""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx.bundle import ENCODER, Bundle, read_bundle
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import make_cache
from pe_onnx.plain_values import plain
from pe_onnx.providers import PROVIDERS, SHORT, resolve_provider
from pe_onnx.session import LEVELS, RECORD_PLACEMENT, PlacedNode, Session
from pe_onnx.sources import Sources
from pe_onnx.tolerance import Tolerance, exact_options, given, tolerance_for

Array = np.ndarray[Any, Any]

ROWS, TOKENS, STEPS = 2, 48, 8
"""Random rows, tokens of the longest, and those of them that are single steps."""
SOURCE_TOKENS = 24
CHUNK_TOKENS = 16
DOMAIN = "pe_onnx"
WORDS = {"off": "not optimised", "basic": "basic", "extended": "extended", "all": "optimised"}


class Fallback(NamedTuple):
    """A node that runs on another provider than its session was asked for."""

    session: str
    node: str
    """Its name in the bundle's file; of a function's body, the name of the node that calls the function."""
    operator: str
    """``pe_onnx::CachedAttention``."""
    body: str | None
    """Of a function: the operator of its body, ``com.microsoft::GroupQueryAttention``, that fell back."""
    provider: str
    """Where it runs."""
    graph: str
    """The file."""


class Apart(NamedTuple):
    """Two sessions that differ by more than is allowed."""

    a: str
    b: str
    difference: float
    """Of the logits' spread; infinite where one has logits that are not finite."""


@dataclass
class SessionMatrix:
    """How far the sessions are from each other."""

    bundle: str
    names: list[str]
    """``cpu, optimised, 2 threads``"""
    differences: list[list[float]]
    """Greatest difference of a logit for each pair, of the first session's spread; ``[n][n]``."""
    spread: float
    """Standard deviation of the first session's logits."""
    tolerance: Tolerance
    positions: int
    """Positions compared."""
    fallbacks: list[Fallback] = field(default_factory=list)

    @property
    def failures(self) -> list[Apart]:
        """Every pair that is further apart than the tolerance allows."""
        pairs = ((i, j) for i in range(len(self.names)) for j in range(i))
        cells = (Apart(self.names[j], self.names[i], self.differences[i][j]) for i, j in pairs)
        return [cell for cell in cells if not cell.difference <= self.tolerance.error]

    @property
    def passed(self) -> bool:
        """Whether every pair is within the tolerance; fall-backs cost time, not exactness, and do not count."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a difference that is not finite is None."""
        values = {
            "bundle": self.bundle,
            "names": self.names,
            "differences": self.differences,
            "spread": self.spread,
            "positions": self.positions,
            "tolerance": self.tolerance._asdict(),
            "fallbacks": [fallback._asdict() for fallback in self.fallbacks],
            "failures": [cell._asdict() for cell in self.failures],
            "passed": self.passed,
        }
        return dict(plain(values))


class Setting(NamedTuple):
    """How a session is opened."""

    provider: str
    level: str
    threads: int

    @property
    def name(self) -> str:
        cores = f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else "all cores"
        return f"{self.provider}, {WORDS[self.level]}, {cores}"


def settings(providers: Sequence[str], threads: Sequence[int]) -> list[Setting]:
    """For each provider every level of optimisation at the first number of threads, then the others, optimised.

    The best comes first: it is what a user runs, and what the differences are relative to.
    """
    made = []
    for provider in providers:
        first, *others = threads
        made += [Setting(provider, level, first) for level in reversed(LEVELS)]
        if resolve_provider(provider) != PROVIDERS["cuda"]:
            made += [Setting(provider, "all", count) for count in others]
    return list(dict.fromkeys(made))


def compare_sessions(
    folder: str | Path,
    providers: Sequence[str] = ("cpu",),
    *,
    rows: Sequence[Sequence[int]] | None = None,
    threads: Sequence[int] = (0, 1),
    tolerance: float | None = None,
    seed: int = 0,
) -> SessionMatrix:
    """Run the same tokens in sessions of a bundle, and compare the logits of every two.

    providers: as ``Session`` takes them. rows: token ids, at least 2 a row (default: random ones); the last eight of
    each row are single steps. Of an encoder-decoder rows are the decoder's, over random sources. threads: of one
    operator, 0 for one a core. tolerance: of a difference relative to the spread, in place of the dtype's and depth's.

    Raises ProviderError where a provider cannot be had, InputError for rows that the bundle cannot take, ConfigError
    for no providers or threads.
    """
    bundle = read_bundle(folder)
    if not providers or not threads:
        raise ConfigError("a session matrix needs at least one provider and one number of threads")
    wanted = settings(providers, threads)
    arrays = _rows(bundle, rows, seed)
    allowed = tolerance_for(bundle.manifest["dtype"], bundle.depth) if tolerance is None else given(tolerance)
    logits, fallbacks = [], []
    for setting in wanted:
        values, fallen = _measure(bundle, setting, arrays, seed)
        logits.append(values)
        fallbacks += fallen
        gc.collect()  # one session at a time: each holds the weights
    spread = float(logits[0].std())
    differences = [[_difference(a, b) / spread for b in logits] for a in logits]
    names = [setting.name for setting in wanted]
    return SessionMatrix(str(folder), names, differences, spread, allowed, len(logits[0]), fallbacks)


def _measure(bundle: Bundle, setting: Setting, rows: list[Array], seed: int) -> tuple[Array, list[Fallback]]:
    """A session's logits, and what fell back in it."""
    opened = {file: _open(bundle, setting, file) for file in bundle.graphs}
    logits = _run(opened[bundle.model.name], opened.get(ENCODER), rows, seed)
    fallen = [fallbacks_of(setting, session.placement(), session.model) for session in opened.values()]
    return logits, [fallback for part in fallen for fallback in part]


def _open(bundle: Bundle, setting: Setting, file: str) -> Session:
    options = {**RECORD_PLACEMENT, **exact_options(bundle)}
    return Session(bundle, setting.provider, setting.threads, options, setting.level, file)


def _rows(bundle: Bundle, rows: Sequence[Sequence[int]] | None, seed: int) -> list[Array]:
    """What is run; checked further by the cache."""
    if rows is None:
        limit = min(TOKENS, bundle.max_length or TOKENS)
        rng = np.random.default_rng(seed)
        return [rng.integers(0, bundle.shape["vocab_size"], max(2, limit - 11 * b)) for b in range(ROWS)]
    if not rows or min(len(row) for row in rows) < 2:
        raise InputError("a session matrix needs rows of at least 2 tokens")
    return [np.asarray(row, np.int64) for row in rows]


def _run(decoder: Session, encoder: Session | None, rows: list[Array], seed: int) -> Array:
    """The logits ``[positions, V]`` of the prompts' ends and of each step: in one batch, then of the first row alone,
    its prompt in chunks."""
    steps = min(STEPS, min(row.size for row in rows) - 1)
    result = []
    for batch, chunk in ((rows, None), (rows[:1], CHUNK_TOKENS)):
        sources = None
        if encoder is not None:
            sources = Sources(encoder, decoder, _sources(decoder.bundle, len(batch), seed))
        cache = make_cache(decoder, len(batch), max(row.size for row in batch), chunk, sources)
        result += [x.astype(np.float64) for x in cache.prefill([row[: row.size - steps].tolist() for row in batch])]
        for step in range(steps, 0, -1):
            result += list(cache.decode([int(row[row.size - step]) for row in batch]).astype(np.float64))
    return np.stack(result)


def _sources(bundle: Bundle, count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed + 1)
    return [rng.integers(0, bundle.shape["vocab_size"], SOURCE_TOKENS - 7 * (b % 3)).tolist() for b in range(count)]


def _difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max()) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")


# Nodes of a function's body have names like ``_inlfunc_CachedAttention_token_3_n0`` once onnxruntime has inlined it:
# the function, a number that grows from call to call and that the first call lacks, and the node in the body.
INLINED = re.compile(r"_inlfunc_(?P<function>[A-Za-z0-9]+)(?:_token_(?P<token>\d+))?_")


def fallbacks_of(setting: Setting, placed: Sequence[PlacedNode], model: Path) -> list[Fallback]:
    """The nodes of a session that are not where it was to run them."""
    full = resolve_provider(setting.provider)
    wanted = SHORT.get(full, full)
    if all(node.provider == wanted for node in placed):
        return []
    callers = _callers(model)
    tokens: dict[str, set[int]] = {}
    for node in placed:
        if found := INLINED.match(node.name):
            tokens.setdefault(found["function"], set()).add(_token(found))
    result = []
    for node in placed:
        if node.provider == wanted:
            continue
        name, operator, body = node.name, node.operator, None
        if found := INLINED.match(node.name):
            function = found["function"]
            operator, body = f"{DOMAIN}::{function}", node.operator
            nodes, numbers = callers.get(function, []), sorted(tokens[function])
            if len(numbers) == len(nodes):  # else some calls were optimised away, and which one this is cannot be told
                name = nodes[numbers.index(_token(found))]
        result.append(Fallback(setting.name, name, operator, body, node.provider, model.name))
    return result


def _callers(model: Path) -> dict[str, list[str]]:
    """Each function of ours to the nodes that call it, in graph order; nothing where onnx is not installed, and with
    it the names by which a bundle's nodes are known."""
    if importlib.util.find_spec("onnx") is None:
        return {}
    import onnx

    result: dict[str, list[str]] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        if node.domain == DOMAIN:
            result.setdefault(node.op_type, []).append(node.name)
    return result


def _token(found: re.Match[str]) -> int:
    return -1 if found["token"] is None else int(found["token"])
