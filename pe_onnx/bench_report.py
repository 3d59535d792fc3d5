"""What a bench measured, as figures and as JSON, CSV rows and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pe_onnx.operator_times import Profile
from pe_onnx.plain_values import plain

FORMAT = 1


@dataclass
class Decode:
    """Decode steps at one depth."""

    depth_tokens: int
    """Tokens in the cache before the step."""
    median_ms: float
    interval_ms: tuple[float, float] | None
    """95 %, of the median; None of fewer than 6 steps."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    steps: int
    precision: float | None
    """Half the interval's width, relative to the median; None of fewer than 6 steps."""
    ended_by: str
    """``precision`` or ``budget``: which of the two ended the measurement (``turns``: the most there may be)."""


@dataclass
class Figures:
    """One contestant. Of PyTorch load time, memory and cache are not known: it runs in this process."""

    name: str
    load_s: float | None = None
    """Median over fresh processes, the page cache warm; imports are not in it."""
    loads: int = 0
    prefill_tokens_per_s: float = math.nan
    prefill_interval_tokens_per_s: tuple[float, float] | None = None
    """95 %, of the median, as that of the first token; None of fewer than 6 prompts."""
    first_token_ms: float = math.nan
    first_token_interval_ms: tuple[float, float] | None = None
    prompts: int = 0
    decode: list[Decode] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    """Resident, of a process of its own that ran the prompt and a step at the greatest depth."""
    cache_bytes_per_token: int | None = None
    cache_bytes: dict[int, int] = field(default_factory=dict)
    """Keys and values of one row by depth."""


@dataclass
class Ratio:
    """Of neighbouring times: 2.0 is that ``above`` takes twice as long as ``below``."""

    above: str
    below: str
    measure: str
    """``decode`` or ``first_token``."""
    depth_tokens: int | None
    ratio: float
    interval: tuple[float, float] | None
    """95 %, of the median ratio; None of fewer than 6 turns."""
    turns: int


@dataclass
class BenchReport:
    """Figures of a bundle, ``contestants[0]``, and of what it was compared with."""

    bundle: str
    provider: str
    threads: int
    """0 for one a core."""
    depths: list[int]
    clipped: bool
    """Whether the encoding takes less than was asked for."""
    prompt_tokens: int
    """Of an encoder-decoder those of the source."""
    encoder_decoder: bool
    budget_s: float
    precision: float
    contestants: list[Figures]
    machine: dict[str, Any]
    tools: dict[str, str]
    ratios: list[Ratio] = field(default_factory=list)
    profile: list[Profile] = field(default_factory=list)
    prompts_ended_by: str = ""
    prompts_precision: float = math.inf
    elapsed_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes, ms, s and tokens are in the names; infinite and unknown figures are None."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        values["profile"] = [profile.to_dict() for profile in self.profile]
        return dict(plain(values))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat row for each figure: contestant, measure, depth, value, its interval, unit."""
        for figures in self.contestants:
            yield from _rows_of(figures)
        for ratio in self.ratios:
            name = f"{ratio.above} / {ratio.below}"
            yield _row(name, f"{ratio.measure}_ratio", ratio.depth_tokens, ratio.ratio, ratio.interval, "")
        for profile in self.profile:
            for part, share in profile.parts.items():
                yield _row(
                    self.contestants[0].name, f"{profile.phase}_share: {part}", profile.depth_tokens, share, None, ""
                )

    def to_csv(self) -> str:
        """The rows with a head."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(_row("", "", None, 0.0, None, "")), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()


def _row(
    name: str, measure: str, depth: int | None, value: float | None, interval: tuple[float, float] | None, unit: str
) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {
        "contestant": name,
        "measure": measure,
        "depth_tokens": depth,
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
    }


def _rows_of(figures: Figures) -> Iterator[dict[str, Any]]:
    name = figures.name
    if figures.load_s is not None:
        yield _row(name, "load", None, figures.load_s, None, "s")
    yield _row(name, "first_token", None, figures.first_token_ms, figures.first_token_interval_ms, "ms")
    yield _row(name, "prefill", None, figures.prefill_tokens_per_s, figures.prefill_interval_tokens_per_s, "tokens/s")
    for d in figures.decode:
        yield _row(name, "decode", d.depth_tokens, d.median_ms, d.interval_ms, "ms")
        for p, value in (("p50", d.p50_ms), ("p90", d.p90_ms), ("p99", d.p99_ms)):
            yield _row(name, f"decode_{p}", d.depth_tokens, value, None, "ms")
    for depth, size in figures.cache_bytes.items():
        yield _row(name, "cache", depth, size, None, "bytes")
    if figures.peak_memory_bytes is not None:
        yield _row(name, "peak_memory", None, figures.peak_memory_bytes, None, "bytes")
