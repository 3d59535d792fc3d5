"""A comparison's figures as tables, for a terminal, for Markdown and for HTML alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pe_onnx.bench_tables import UNKNOWN, Table
from pe_onnx.comparison_figures import AtLength, Comparison, Contestant

CANNOT = "cannot"


def tables(report: Comparison) -> Iterator[Table]:
    """Bits, decode, prefill, sizes."""
    if any(row.bits_per_byte is not None for c in report.contestants for row in c.lengths):
        title = "Bits per byte, in windows of as many tokens"
        yield _by_length(report, title, lambda row: _number(row.bits_per_byte, ",.3f"))
    yield _by_length(report, "Decode, ms per token at a length", lambda row: _number(row.decode_ms, ".3g"))
    yield _by_length(
        report, "Prefill of a length, tokens per second", lambda row: _number(row.prefill_tokens_per_s, ",.0f")
    )
    yield _sizes(report)


def notes(report: Comparison) -> Iterator[str]:
    """What the figures are of, and what could not be had."""
    yield (
        f"Text: {report.text}, {report.tokens:,} tokens of it, cut into windows that are run from nothing; at each "
        f"length the same tokens count, those that are predicted in the windows of every length."
    )
    if report.left_out:
        longer = ", ".join(f"{length:,}" for length in report.left_out)
        yield f"The text is too short for windows of {longer} tokens."
    for c in report.contestants:
        reasons = dict.fromkeys(row.cannot for row in c.lengths if row.cannot)
        for reason in reasons:
            yield f"{c.name} {reason}."
        if c.no_bits:
            yield f"{c.name} has no bits per byte: it {c.no_bits}."
        if c.path_dependent:
            yield f"{c.name}: its logits depend on the runs; each window ran whole."
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}" if report.threads else "a thread a core"
    yield (
        f"Times are medians, contestants in turns, batch 1, {report.provider}, {threads}; memory is the resident "
        f"peak of a process of its own. {report.elapsed_s:.0f} s in all."
    )


def markdown(report: Comparison) -> str:
    """Findings, all tables and the notes."""
    parts = [*(f"- {line}" for line in report.findings())]
    text = ["\n".join(parts)] if parts else []
    text += [table.to_markdown() for table in tables(report)]
    return "\n\n".join([*text, "\n".join(f"- {note}" for note in notes(report))]) + "\n"


def _by_length(report: Comparison, title: str, cell: Callable[[AtLength], str]) -> Table:
    trained = report.trained_length
    names = [f"{length:,}{' (trained)' if length == trained else ''}" for length in report.lengths]
    rows = [[c.name, *(CANNOT if row.cannot else cell(row) for row in c.lengths)] for c in report.contestants]
    return Table(title, ["contestant", *names], rows, {"contestant"})


def _sizes(report: Comparison) -> Table:
    measured = [n for n in report.lengths if any(c.at(n).peak_memory_bytes is not None for c in report.contestants)]
    columns = ["contestant", "weights", "bytes", "all MB", "kB/token", "load s"]
    columns += [f"MB at {length:,}" for length in measured]
    title = "Sizes: the encoding's own weights, all weights, the cache, seconds to load, peak of memory at a length"
    return Table(title, columns, [_size_row(c, measured) for c in report.contestants], {"contestant"})


def _size_row(c: Contestant, measured: list[int]) -> list[str]:
    peaks = [(c.at(length).cannot, c.at(length).peak_memory_bytes) for length in measured]
    return [
        c.name,
        _number(c.encoding_weights, ","),
        _number(c.encoding_bytes, ","),
        f"{c.weight_bytes / 1e6:,.2f}",
        f"{c.cache_bytes_per_token / 1e3:,.1f}",
        _number(c.load_s, ".2f"),
        *(CANNOT if no else _number(None if peak is None else peak / 1e6, ",.0f") for no, peak in peaks),
    ]


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"
