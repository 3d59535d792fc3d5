"""Encodings compared: bits per byte past the trained length, time against length, memory, the encoding's own weights.

Everything is measured in onnxruntime. Bits are those of one text, the same bytes of it at each length; times are taken
in turns, so that a slow moment of the machine falls on all; peak memory is that of processes of their own. Contestants
are bundles, and without any the trained byte-level decoders that come with pe-onnx, exported for this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pe_onnx import trained_weights
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.comparison_figures import AtLength, Bucket, Comparison, Contestant
from pe_onnx.contestants import BundleContestant, check_memory, random_tokens
from pe_onnx.contract import storage_dtype
from pe_onnx.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from pe_onnx.fresh_process import call_fresh
from pe_onnx.intervals import median_interval
from pe_onnx.machine import RUNTIME_PACKAGES, describe_machine, versions
from pe_onnx.providers import device_of, resolve_provider
from pe_onnx.session import MAX_THREADS
from pe_onnx.text_bits import STEP_ROWS, Text, counted, read_text, tokenized, why_no_bits, why_not, window_bits
from pe_onnx.trained_contestants import Spec, exported, extended_rope, shipped, trained_for
from pe_onnx.turns import Seconds, in_turns

MULTIPLES = (0.5, 1, 2, 4, 8)
"""Of the trained length."""
UNKNOWN_LENGTH = 256
"""Trained length where no contestant knows one."""
TOKENS = 16384
"""Of the text."""
PRECISION = 0.02
LEAST_STEPS, MOST_STEPS = 20, 400
STEPS_A_TURN = 5
"""Of them the median counts: a small decoder's step is shorter than what disturbs it."""
LEAST_PROMPTS, MOST_PROMPTS = 6, 40
BUDGET_S = 60.0

Progress = Callable[[str], None]


class Entrant(NamedTuple):
    """A contestant before it is measured."""

    name: str
    bundle: Bundle
    shown: str
    """Where it is from."""


def compare(
    folders: Sequence[str | Path] = (),
    *,
    encodings: Sequence[Spec] | None = None,
    extended: bool = False,
    lengths: Sequence[int] | None = None,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    provider: str = "cpu",
    threads: int = 0,
    budget_s: float = BUDGET_S,
    progress: Progress = lambda stage: None,
) -> Comparison:
    """Measure bundles beside one another.

    folders: bundles. encodings: trained decoders of pe-onnx's own, exported into a folder that goes again; by default
    all where no folder is given, else none. extended: RoPE's weights at four times their length too. lengths: tokens;
    by default MULTIPLES of the least trained length. text: a file in UTF-8, in place of the one that none of our
    decoders was trained on; its first ``tokens`` tokens count, and at least the greatest length. budget_s: for all
    that is timed, s.

    Raises ConfigError for what is out of range, InputError for a text that cannot be used or a cache that does not fit,
    BundleError for a bundle that is broken, and what ``export`` raises.
    """
    begin = time.perf_counter()
    _check(lengths, tokens, threads, budget_s)
    resolved = resolve_provider(provider)
    specs = list(encodings if encodings is not None else [] if folders else shipped())
    if extended:
        have = [spec.name for spec in specs]
        specs += [spec for spec in extended_rope() if spec.name not in have]
    if not specs and not folders:
        raise ConfigError("no bundle is given, and this installation of pe-onnx has no trained weights; name bundles")
    progress("read")
    weights = [trained_for(spec) for spec in specs]
    read = [read_bundle(folder) for folder in folders]
    for bundle in read:
        if bundle.crossing is not None:
            raise ConfigError(f"bundle {bundle.folder} is an encoder-decoder; decoders are compared")
    written = _text(text)
    with exported(specs, weights, "fp16" if resolved == "CUDAExecutionProvider" else "fp32", progress) as made:
        entrants = [Entrant(Path(b.folder).resolve().name, b, str(b.folder)) for b in read]
        entrants += [
            Entrant(spec.name, bundle, f"trained weights of {name}")
            for (spec, bundle), name in zip(made, weights, strict=True)
        ]
        entrants = _distinct(entrants)
        trained = min((length for _, b, _ in entrants if (length := _trained_length(b))), default=None)
        wanted = sorted(set(lengths or (int(m * (trained or UNKNOWN_LENGTH)) or 1 for m in MULTIPLES)))
        texts = {name: _tokens(bundle, written, max(tokens, wanted[-1])) for name, bundle, _ in entrants}
        shortest = min((len(one.ids) for one in texts.values() if one is not None), default=wanted[-1])
        fitting = [length for length in wanted if length <= shortest]
        if fitting != wanted and (lengths is not None or not fitting):
            raise InputError(
                f"the text has {shortest:,} tokens, fewer than a length of {wanted[-1]:,}; give a longer one"
            )
        counts = min(shortest, max(tokens, fitting[-1]))
        report = Comparison(
            text="held-out text that comes with pe-onnx" if text is None else str(text),
            tokens=counts,
            lengths=fitting,
            left_out=[length for length in wanted if length not in fitting],
            trained_length=trained,
            provider=resolved,
            threads=threads,
            budget_s=budget_s,
            contestants=[_contestant(entrant, fitting, counts, provider) for entrant in entrants],
            machine=describe_machine(),
            tools=versions((*RUNTIME_PACKAGES, *(("torch",) if specs else ()))),
        )
        _measure(report, entrants, texts, provider, progress)
    report.elapsed_s = time.perf_counter() - begin
    return report


def stage_count(folders: int, specs: int, lengths: int) -> int:
    """Calls of ``progress`` that ``compare`` makes, for a bar."""
    return 1 + specs + (folders + specs) * (1 + lengths) + 2 * lengths


def _measure(
    report: Comparison, entrants: list[Entrant], texts: dict[str, Text | None], provider: str, progress: Progress
) -> None:
    timed: dict[str, BundleContestant] = {}
    for entrant, figures in zip(entrants, report.contestants, strict=True):
        progress(f"memory of {entrant.name}")
        _note_memory(figures, entrant, report, provider)
    for entrant, figures in zip(entrants, report.contestants, strict=True):
        timed[entrant.name] = BundleContestant(entrant.bundle.folder, provider, report.threads, name=entrant.name)
        text = texts[entrant.name]
        if text is not None and figures.no_bits is None:
            _note_bits(figures, timed[entrant.name], text, report, progress)
    deadline = time.perf_counter() + report.budget_s
    stages = 2 * len(report.lengths)
    for length in report.lengths:
        ready = [c for c in report.contestants if c.at(length).cannot is None]
        for i, (what, note) in enumerate((("prefill", _note_prefill), ("decode", _note_decode))):
            progress(f"{what} at {length:,} tokens")
            now = time.perf_counter()
            until = now + max(deadline - now, 0) / (stages - i)
            if ready:
                note(ready, timed, length, until)
        stages -= 2


def _note_memory(figures: Contestant, entrant: Entrant, report: Comparison, provider: str) -> None:
    """At the trained length, where all can be compared, and at the greatest it takes."""
    able = [row.length_tokens for row in figures.lengths if row.cannot is None]
    for length in sorted({n for n in able if n == report.trained_length} | set(able[-1:])):
        result = call_fresh(
            "pe_onnx.latency:load_and_peak",
            folder=str(entrant.bundle.folder),
            provider=provider,
            threads=report.threads,
            depth_tokens=max(length - 1, 1),
            prompt=random_tokens(length, entrant.bundle.shape["vocab_size"]),
            source=None,
            run=True,
        )
        figures.at(length).peak_memory_bytes = result["peak_memory_bytes"]
        figures.load_s = result["load_s"]


def _note_bits(
    figures: Contestant, contestant: BundleContestant, text: Text, report: Comparison, progress: Progress
) -> None:
    able = [row.length_tokens for row in figures.lengths if row.cannot is None]
    ids, sizes = text.ids[: report.tokens], text.sizes[: report.tokens]
    compared = counted(len(ids), report.lengths)
    for length in able:
        progress(f"bits per byte of {figures.name} at {length:,} tokens")
        bits = window_bits(contestant.session, ids, length)
        flat = bits.reshape(-1)
        kept = compared[: flat.size]
        figures.at(length).bits_per_byte = float(flat[kept].sum() / sizes[: flat.size][kept].sum())
        if length == able[-1]:
            width, held = report.lengths[0], sizes[: bits.size].reshape(bits.shape)
            for begin in range(0, length, width):
                end, predicted = min(begin + width, length), slice(max(begin, 1), begin + width)
                if end > predicted.start:
                    rate = float(bits[:, predicted].sum() / held[:, predicted].sum())
                    figures.by_position.append(Bucket(begin, end, rate))


def _note_prefill(ready: list[Contestant], timed: dict[str, BundleContestant], length: int, until: float) -> None:
    def call(contestant: BundleContestant) -> Callable[[], Seconds]:
        prompt = random_tokens(length, contestant.bundle.shape["vocab_size"])
        return lambda: (contestant.first_token(prompt).prefill_s,)

    turns = in_turns({c.name: call(timed[c.name]) for c in ready}, until, PRECISION, LEAST_PROMPTS, MOST_PROMPTS)
    for c in ready:
        found, row = median_interval([seconds for (seconds,) in turns.times[c.name]]), c.at(length)
        row.prefill_tokens_per_s = length / found.median
        if found.interval is not None:
            row.prefill_interval_tokens_per_s = (length / found.high, length / found.low)


def _note_decode(ready: list[Contestant], timed: dict[str, BundleContestant], length: int, until: float) -> None:
    def call(contestant: BundleContestant) -> Callable[[], Seconds]:
        contestant.begin(max(length - 1, 1))

        def steps() -> Seconds:
            times = []
            for _ in range(STEPS_A_TURN):
                begin = time.perf_counter()
                contestant.step()
                times.append(time.perf_counter() - begin)
            return (median(times),)

        return steps

    turns = in_turns({c.name: call(timed[c.name]) for c in ready}, until, PRECISION, LEAST_STEPS, MOST_STEPS, 3)
    for c in ready:
        found, row = median_interval([1000 * seconds for (seconds,) in turns.times[c.name]]), c.at(length)
        row.decode_ms, row.decode_interval_ms = found.median, found.interval


def _text(text: str | Path | None) -> str:
    if text is not None:
        return read_text(Path(text))
    return trained_weights.held_out().decode("utf-8")


def _tokens(bundle: Bundle, text: str, tokens: int) -> Text | None:
    return None if why_no_bits(bundle) else tokenized(bundle, text, tokens)


def _distinct(entrants: list[Entrant]) -> list[Entrant]:
    """Names made different: the folder's path where two have one name, numbers where that is one too."""
    short = [entrant.name for entrant in entrants]
    long = [e.shown if short.count(e.name) > 1 and Path(e.shown).is_dir() else e.name for e in entrants]
    return [
        e._replace(name=name if long.count(name) == 1 else f"{name} ({long[: i + 1].count(name)})")
        for i, (e, name) in enumerate(zip(entrants, long, strict=True))
    ]


def _contestant(entrant: Entrant, lengths: Sequence[int], tokens: int, provider: str) -> Contestant:
    bundle = entrant.bundle
    for length in lengths:
        if why_not(bundle, length) is None:
            rows = 1 if bundle.logits == "all" else min(STEP_ROWS, max(1, tokens // length))
            check_memory(bundle, rows * length, "--length")
    source = bundle.manifest["source"]
    config = source["config"] if source["kind"] == "encoding" else None
    encoding = encoding_of(config, trained=False)
    weights = None if encoding is None else sum(parameter.numel() for parameter in encoding.parameters())
    itemsize = storage_dtype(bundle.dtype).itemsize
    return Contestant(
        name=entrant.name,
        bundle=entrant.shown,
        encoding=bundle.manifest["encoding"]["name"],
        parameters={key: entry["value"] for key, entry in bundle.manifest["encoding"]["parameters"].items()},
        trained_length=_trained_length(bundle),
        max_length=bundle.max_length,
        path_dependent=bundle.path_dependent,
        target=bundle.target,
        dtype=bundle.manifest["dtype"],
        weight_bytes=bundle.manifest["graph"]["weight_bytes"],
        encoding_weights=weights,
        encoding_bytes=None if weights is None else weights * itemsize,
        cache_bytes_per_token=bundle.cache_bytes_on(device_of(provider).kind),
        config=config,
        lengths=[AtLength(length, why_not(bundle, length)) for length in lengths],
        no_bits=why_no_bits(bundle),
    )


def _trained_length(bundle: Bundle) -> int | None:
    """Of the weights, also where a factor has stretched what the bundle is for."""
    weights = bundle.manifest["source"].get("config", {}).get("weights")
    if weights is None:
        return bundle.trained_length
    found = trained_weights.config(weights)["max_position_embeddings"]
    assert isinstance(found, int)
    return found


def encoding_of(config: Mapping[str, Any] | None, trained: bool = True) -> Any:
    """The encoding's module of our own decoder of that configuration, with random weights unless ``trained``; None for
    no configuration, where PyTorch is missing, or where this pe-onnx no longer knows what the configuration names."""
    if config is None:
        return None
    try:
        from pe_onnx.config import DecoderConfig
        from pe_onnx.encoding import build_encoding
        from pe_onnx.models.decoder import Decoder
    except (ImportError, MissingDependencyError):
        return None
    try:
        made = DecoderConfig.from_dict(config)
        return Decoder(made).encoding if trained else build_encoding(made)
    except (ConfigError, CheckpointError):
        return None


def _check(lengths: Sequence[int] | None, tokens: int, threads: int, budget_s: float) -> None:
    """Raises ConfigError for what is out of range."""
    if not 0 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads = {threads} must be in 0..{MAX_THREADS}; 0 is one for each core")
    if lengths is not None and (not lengths or min(lengths) < 2):
        raise ConfigError(f"lengths = {list(lengths)} must be at least one number of at least 2 tokens")
    if tokens < 2:
        raise ConfigError(f"tokens = {tokens} must be at least 2")
    if not 0 < budget_s < math.inf:
        raise ConfigError(f"budget = {budget_s} must be more than 0 s")
