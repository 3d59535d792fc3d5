"""Parity: a bundle in onnxruntime against PyTorch on the same tokens, figures first, verdict second.

The reference is eager PyTorch, all tokens at once without a cache: our own decoder from its configuration and seed,
or transformers' own model from the checkpoint. Generated text is no evidence; logits decide. An encoder-decoder is
given sources: its encoder's output is compared too, and beam search with transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pe_onnx import seq2seq_parity
from pe_onnx.angles import rotary_angles
from pe_onnx.bundle import ENCODER, Bundle, read_bundle
from pe_onnx.errors import BundleError, CheckpointError, ConfigError, InputError, did_you_mean
from pe_onnx.kv_cache import KVCache, make_cache
from pe_onnx.kv_cache import Path as RunPath
from pe_onnx.parity_modes import MODES, Opener, Pair
from pe_onnx.parity_report import Account, ModeResult, ParityReport
from pe_onnx.session import Session
from pe_onnx.tolerance import Tolerance, exact_options, given, tolerance_for

Array = np.ndarray[Any, Any]
Hold = Callable[[Any], Any]
"""A module to the same, with other weights perhaps."""
Reference = Callable[[Array], Array]
"""Token ids int64 ``[B, T]`` to float32 logits ``[B, T, V]``."""


class PathReference(Protocol):
    """A reference whose logits depend on the chunks in which a text is run."""

    def follow(self, path: RunPath) -> list[Array]:
        """The bundle's runs to each row's float32 logits ``[tokens, V]``."""
        ...


DEFAULT_TOKENS = 160
GREEDY_TOKENS = 64
GREEDY = "greedy"
"""The mode that makes its own tokens."""
ALL_MODES = (seq2seq_parity.ENCODER, *MODES, GREEDY, seq2seq_parity.BEAMS)


class Caches:
    """Opens caches of a bundle; of an encoder-decoder over the sources of the rows."""

    def __init__(self, session: Session, sources: seq2seq_parity.Requests | None = None) -> None:
        self.session = session
        self.bundle = session.bundle
        self.sources = sources
        self.noted: list[tuple[KVCache, list[int]]] | None = None
        """Where a list is put here, caches note what the graph is given, and are kept with their rows."""

    def __call__(self, rows: Sequence[int], max_length: int, chunk_tokens: int | None = None) -> KVCache:
        sources = None if self.sources is None else self.sources.of(rows)
        cache = make_cache(self.session, len(rows), max_length, chunk_tokens, sources)
        cache.path = []
        if self.noted is not None:
            cache.feeds = []
            self.noted.append((cache, list(rows)))
        return cache


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
    relative error, in place of the one that follows from dtype and depth.

    Of an encoder-decoder rows are sources, by default of different lengths, each with ``tokens`` random tokens of the
    decoder; the reference is a checkpoint's path, transformers' model, or a ``Seq2SeqReference``.

    A quantized bundle is compared with PyTorch with the bundle's rounded weights, both multiplying in floats: what the
    rounding of weights and activations costs is another question (``quality.py``).

    Raises CheckpointError where the reference cannot be had.
    """
    compared = prepare(
        folder,
        reference,
        rows=rows,
        tokens=tokens,
        modes=modes,
        provider=provider,
        tolerance=tolerance,
        seed=seed,
        threads=threads,
    )
    allowed, expected = compared.allowed, compared.expected
    report = ParityReport(str(folder), compared.name, compared.bundle.manifest["dtype"], allowed, expected.spread)
    for mode in compared.modes:
        if mode == GREEDY or mode in MODES:
            report.modes.append(_compare(compared, mode))
        elif compared.requests is not None:
            report.modes.append(compared.requests.compare(mode, allowed, expected.spread))
    with suppress(BundleError):  # a figure, on which no verdict hangs
        report.angles = rotary_angles(folder)
    return report


@dataclass
class Comparison:
    """Both sides of a parity check, ready to run."""

    bundle: Bundle
    name: str
    """Of the reference."""
    open_cache: Caches
    rows: list[Array]
    """Token ids of each row; of an encoder-decoder those of the decoder."""
    expected: Expected
    allowed: Tolerance
    requests: seq2seq_parity.Requests | None
    """The sources of an encoder-decoder."""
    modes: list[str]

    def retarget(self, rows: Sequence[Sequence[int]]) -> None:
        """Other tokens for the decoder of an encoder-decoder, over the same sources."""
        self.rows = [np.asarray(row, np.int64) for row in rows]
        self.expected = Expected(self.expected.references, self.rows, self.bundle.shape["vocab_size"])


def prepare(
    folder: str | Path,
    reference: Any = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    tokens: int = DEFAULT_TOKENS,
    modes: Sequence[str] | None = None,
    provider: str = "cpu",
    tolerance: float | None = None,
    seed: int = 0,
    threads: int = 0,
    hold: Hold | None = None,
    kernels: bool = False,
) -> Comparison:
    """What ``check_parity`` compares, with the same arguments and errors. hold: of ``resolve_reference``.
    kernels: of a quantized bundle those that users run, which may round activations, in place of exact ones."""
    bundle = read_bundle(folder)
    if tokens < 2:
        raise ConfigError(f"length = {tokens} must be at least 2 tokens")
    if seed < 0 or (tolerance is not None and not tolerance >= 0):
        raise ConfigError(f"seed = {seed} and tolerance = {tolerance} must be at least 0")
    crossed = bundle.crossing is not None
    limit = min(tokens, bundle.max_length or tokens)
    if rows is None:
        rng = np.random.default_rng(seed)
        arrays = [rng.integers(0, bundle.shape["vocab_size"], limit) for _ in range(4)]
        arrays = seq2seq_parity.ragged(arrays) if crossed else arrays
    else:
        arrays = [np.asarray(row, np.int64) for row in rows]
    for row in arrays:
        if row.size < 2 and not (crossed and row.size):
            raise InputError("parity needs rows of at least 2 tokens")
        if bundle.max_length is not None and row.size > bundle.max_length:
            raise InputError(f"{row.size} tokens are more than the {bundle.max_length} positions of the encoding")
        if row.min() < 0 or row.max() >= bundle.shape["vocab_size"]:
            raise InputError(f"token ids {row.min()}..{row.max()} must be in 0..{bundle.shape['vocab_size'] - 1}")
    if not arrays:
        raise InputError("parity needs at least one row of tokens")
    wanted = _modes(bundle, modes)
    compute, name = resolve_reference(bundle, reference, hold)
    options = {} if kernels else exact_options(bundle)
    session = Session(bundle, provider, threads, options)
    requests = None
    if crossed:
        encoder = Session(bundle, provider, threads, options, graph=ENCODER)
        requests = seq2seq_parity.Requests(encoder, session, arrays, compute)
        arrays = seq2seq_parity.targets(bundle, arrays, tokens, seed)
    allowed = tolerance_for(bundle.manifest["dtype"], bundle.depth) if tolerance is None else given(tolerance)
    references = [compute if requests is None else requests.reference_of(b) for b in range(len(arrays))]
    expected = Expected(references, arrays, bundle.shape["vocab_size"])
    return Comparison(bundle, name, Caches(session, requests), arrays, expected, allowed, requests, wanted)


class Expected:
    """The reference's logits: of every row, computed once, or along the paths of the bundle's caches."""

    def __init__(self, references: Sequence[Reference | PathReference], rows: list[Array], vocab_size: int) -> None:
        """references: of each row; all the same but for an encoder-decoder."""
        self.references = references
        width = self.at_once(0, np.zeros(1, np.int64)).shape[-1]
        if width != vocab_size:
            raise CheckpointError(f"the reference has a vocabulary of {width}, the bundle of {vocab_size}")
        self.logits = [self.at_once(b, row) for b, row in enumerate(rows)]
        self.spread = float(np.concatenate([x.reshape(-1) for x in self.logits]).std())

    def at_once(self, b: int, tokens: Array) -> Array:
        """Row b's tokens ``[T]`` to ``[T, V]``, all in one run."""
        reference = self.references[b]
        return reference(tokens[None])[0] if callable(reference) else reference.follow([{0: tokens}])[0]

    def along(self, b: int, cache: KVCache, tokens: Array) -> Array:
        """The logits ``[T, V]`` of the tokens in a cache of row b alone, run as they were."""
        reference = self.references[b]
        return self.at_once(b, tokens) if callable(reference) else reference.follow(cache.path or [])[0]

    def join(self, pairs: Iterator[Pair]) -> Iterator[tuple[Pair, Array]]:
        """Each pair with what is expected of it."""
        reference = self.references[0]
        if callable(reference):
            yield from ((pair, self.logits[pair.row][pair.position]) for pair in pairs)
            return
        held = [pair._replace(logits=pair.logits.copy()) for pair in pairs]
        caches = {id(pair.cache): pair.cache for pair in held}
        followed = {key: reference.follow(cache.path or []) for key, cache in caches.items()}
        yield from ((pair, followed[id(pair.cache)][pair.slot][pair.position]) for pair in held)


def compared_pairs(compared: Comparison, mode: str) -> Iterator[tuple[Pair, Array]]:
    """The bundle's logits of a mode that runs tokens through a cache, each with what the reference gives."""
    if mode == GREEDY:
        return _greedy(compared.open_cache, compared.rows, compared.expected)
    return compared.expected.join(MODES[mode](compared.open_cache, compared.rows))


def _compare(compared: Comparison, mode: str) -> ModeResult:
    account = Account(mode, compared.expected.spread, compared.allowed)
    for pair, want in compared_pairs(compared, mode):
        token = f"position {pair.position}"
        if mode == GREEDY:
            token = f"new token {pair.position + 1 - _prompt_tokens(compared.rows[pair.row])}"
        account.add(f"row {pair.row}, {token}", want, pair.logits)
    return account.finish()


def _prompt_tokens(row: Array) -> int:
    """Of the greedy mode: the first half of a row."""
    return max(row.size // 2, 1)


def _greedy(open_cache: Opener, rows: list[Array], expected: Expected) -> Iterator[tuple[Pair, Array]]:
    """Greedy tokens from the first half of a row; each must be the reference's choice, given those before it."""
    limit = open_cache.bundle.max_length
    for b, row in enumerate(rows):
        prompt = row[: _prompt_tokens(row)].tolist()
        count = min(GREEDY_TOKENS, (limit or len(prompt) + GREEDY_TOKENS) - len(prompt))
        cache = open_cache([b], len(prompt) + count)
        logits = [cache.prefill([prompt])[0].copy()]
        made = [int(logits[0].argmax())]
        while len(made) < count:
            logits.append(cache.decode([made[-1]])[0].copy())
            made.append(int(logits[-1].argmax()))
        want = expected.along(b, cache, np.array(prompt + made[:-1], np.int64))[len(prompt) - 1 :]
        for i, have in enumerate(logits):
            yield Pair(b, len(prompt) - 1 + i, have, cache, 0), want[i]


def modes_of(bundle: Bundle) -> list[str]:
    """The modes that a bundle's target and kind allow, in their order."""
    left_out = set() if bundle.crossing is not None else set(seq2seq_parity.MODES)
    if bundle.target == "ort":  # takes compact rows only
        left_out |= {mode for mode in ALL_MODES if mode.endswith("_padding")}
    return [mode for mode in ALL_MODES if mode not in left_out]


def _modes(bundle: Bundle, wanted: Sequence[str] | None) -> list[str]:
    """The modes that were asked for, by default all that the bundle allows. Raises ConfigError for an unknown one."""
    known = [mode for mode in ALL_MODES if bundle.crossing is not None or mode not in seq2seq_parity.MODES]
    for mode in wanted or ():
        if mode not in known:
            raise ConfigError(f"unknown mode {mode!r}{did_you_mean(mode, known)} (known: {', '.join(known)})")
    return list(wanted) if wanted else modes_of(bundle)


def resolve_reference(bundle: Bundle, reference: Any = None, hold: Hold | None = None) -> tuple[Any, str]:
    """The PyTorch side as a function of token ids or of the bundle's runs, and its name; of an encoder-decoder a
    Seq2SeqReference.

    hold: what is done to its module, or to a copy of one that is handed in. By default that of a quantized bundle is
    given the bundle's rounded weights; a function is taken as it is.
    """
    from pe_onnx.rounded_module import as_it_is, holder

    if hold is not None:
        return _resolved(bundle, reference, hold)
    hold = holder(bundle)
    compute, name = _resolved(bundle, reference, hold)
    return compute, name if hold is as_it_is else f"{name}, with the rounded weights"


def _resolved(bundle: Bundle, reference: Any, hold: Hold) -> Any:
    from pe_onnx import reference as references
    from pe_onnx.rounded_module import of_caller

    if bundle.crossing is not None:
        return references.seq2seq(bundle.manifest, reference, hold)
    if reference is None:
        return references.from_manifest(bundle.manifest, hold)
    if isinstance(reference, str | Path):
        scaling = bundle.manifest["source"].get("rope_scaling")
        return references.from_checkpoint(Path(reference), scaling, hold), f"transformers, {reference}"
    if bundle.manifest["source"]["kind"] == "module" and references.follows_contract(reference):
        return references.of_contract(of_caller(reference, hold), bundle.caches), type(reference).__name__
    if references.is_module(reference):
        return references.from_module(of_caller(reference, hold)), type(reference).__name__
    if callable(reference) or hasattr(reference, "follow"):
        return reference, getattr(reference, "__name__", "a function")
    raise CheckpointError(f"reference = {reference!r} must be a checkpoint's path, a module or a function")
