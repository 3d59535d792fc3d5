"""A bench's figures as tables, for a terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pe_onnx.attribution import ENCODING
from pe_onnx.bench_report import BenchReport, Decode, Figures
from pe_onnx.operator_times import Profile

UNKNOWN = "-"
TOP_OPERATORS = 10


@dataclass
class Table:
    """Text by rows; the columns named in ``left`` are words, the others figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: set[str] = field(default_factory=set)

    def to_markdown(self) -> str:
        """GitHub's form of it, under its title."""
        line = "|" + "|".join("---" if name in self.left else "---:" for name in self.columns) + "|"
        rows = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (self.columns, *self.rows)]
        return "\n".join([f"{self.title}:", "", rows[0], line, *rows[1:]])


def tables(report: BenchReport) -> Iterator[Table]:
    """What there is: contestants, decode steps, ratios, parts, operators."""
    yield _contestants(report)
    yield _decode(report)
    if report.ratios:
        yield _ratios(report)
    if report.profile:
        yield _parts(report)
        yield _operators(report.profile[-1])


def summary(report: BenchReport) -> str:
    """Two lines: what ended the measurements, and what the figures are of."""
    ends = [(d.ended_by, d.precision) for d in report.contestants[0].decode]
    by_budget = sum(end == "budget" for end, _ in ends) + (report.prompts_ended_by == "budget")
    reached = max((p if p is not None else float("inf") for _, p in ends), default=float("inf"))
    widest = max(reached, report.prompts_precision)
    loads = report.contestants[0].loads
    ended = (
        f"the budget of {report.budget_s:g} s ended {by_budget} of {len(ends) + 1} measurements"
        if by_budget
        else f"every interval is within the precision of {report.precision:.0%}, in less than {report.budget_s:g} s"
    )
    wide = (
        f"the widest 95 % interval is +-{widest:.1%}" if widest < float("inf") else "some have too few figures for one"
    )
    return (
        f"{ended[0].upper()}{ended[1:]}; {wide}; {report.elapsed_s:.0f} s in all.\n"
        f"Load: median of {loads} fresh processes, page cache warm, imports left out. Memory: resident peak of a "
        f"process of its own."
    )


def markdown(report: BenchReport) -> str:
    """All tables and the summary."""
    return "\n\n".join([*(table.to_markdown() for table in tables(report)), summary(report)]) + "\n"


def _contestants(report: BenchReport) -> Table:
    prompt = f"{'source' if report.encoder_decoder else 'prompt'} of {report.prompt_tokens:,} tokens"
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}" if report.threads else "a thread a core"
    columns = ["contestant", "load, s", "prefill, tokens/s", "first token, ms", "peak MB", "cache, kB/token"]
    rows = [
        [
            f.name,
            _number(f.load_s, 2),
            f"{f.prefill_tokens_per_s:,.0f}",
            f"{f.first_token_ms:,.2f}",
            _number(None if f.peak_memory_bytes is None else f.peak_memory_bytes / 1e6, 0),
            _number(None if f.cache_bytes_per_token is None else f.cache_bytes_per_token / 1e3, 1),
        ]
        for f in report.contestants
    ]
    return Table(f"{report.provider}, {threads}, {prompt}", columns, rows, {"contestant"})


def _decode(report: BenchReport) -> Table:
    columns = ["contestant", "depth", "ms/token", "95 %", "p90", "p99", "steps", "ended by", "cache MB"]
    rows = [_decode_row(f, d) for f in report.contestants for d in f.decode]
    clipped = ", clipped to what the encoding takes" if report.clipped else ""
    return Table(f"Decode by tokens in the cache{clipped}", columns, rows, {"contestant", "ended by"})


def _decode_row(figures: Figures, d: Decode) -> list[str]:
    size = figures.cache_bytes.get(d.depth_tokens)
    return [
        figures.name,
        f"{d.depth_tokens:,}",
        f"{d.median_ms:.3g}",
        _interval(d.interval_ms, ".3g"),
        f"{d.p90_ms:.3g}",
        f"{d.p99_ms:.3g}",
        str(d.steps),
        d.ended_by,
        _number(None if size is None else size / 1e6, 2),
    ]


def _ratios(report: BenchReport) -> Table:
    columns = ["time of / time of", "measure", "depth", "ratio", "95 %", "turns"]
    rows = [
        [
            f"{r.above} / {r.below}",
            r.measure.replace("_", " "),
            UNKNOWN if r.depth_tokens is None else f"{r.depth_tokens:,}",
            f"{r.ratio:.2f}",
            _interval(r.interval, ".2f"),
            str(r.turns),
        ]
        for r in report.ratios
    ]
    return Table("Ratios of neighbouring times", columns, rows, {"time of / time of", "measure"})


def _parts(report: BenchReport) -> Table:
    parts = list(report.profile[0].parts)
    rows = [
        [phase_name(p).removesuffix(" tokens"), *(f"{p.parts[part]:.1%}" for part in parts)] for p in report.profile
    ]
    return Table(f"Share of time by part, {report.contestants[0].name}", ["phase", *parts], rows, {"phase"})


def _operators(profile: Profile) -> Table:
    columns = ["operator", "part", "nodes", "us", "share"]
    rows = [
        [o.operator, o.part, str(o.nodes), f"{o.us:,.0f}", f"{o.share:.1%}"] for o in profile.operators[:TOP_OPERATORS]
    ]
    for name, part, nodes, us, share in others(profile, TOP_OPERATORS):
        rows.append([name, part or UNKNOWN, str(nodes), f"{us:,.0f}", f"{share:.1%}"])
    return Table(f"Time by operator, {phase_name(profile)}", columns, rows, {"operator", "part"})


def others(profile: Profile, top: int) -> list[tuple[str, str, int, float, float]]:
    """What comes after the ``top`` costliest operators, the encoding's and the rest: (name, part, nodes, us, share)."""
    rest = profile.operators[top:]
    sides = [(ENCODING, [o for o in rest if o.part == ENCODING]), ("", [o for o in rest if o.part != ENCODING])]
    return [
        (f"{len(side)} others", part, sum(o.nodes for o in side), sum(o.us for o in side), sum(o.share for o in side))
        for part, side in sides
        if side
    ]


def phase_name(profile: Profile) -> str:
    """``decode at 1,024 tokens``."""
    return profile.phase if profile.depth_tokens is None else f"{profile.phase} at {profile.depth_tokens:,} tokens"


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return UNKNOWN if interval is None else f"{interval[0]:{form}}..{interval[1]:{form}}"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"
