"""A bench as a figure: decode time against depth with intervals, and time by operator where that was profiled.

Grounds are transparent and all ink is of middle lightness, so that one file stands on light and on dark pages: text
has a contrast of at least 4.1 on white and on #0d1117, lines of at least 3. Colours are those of Okabe and Ito that
reach this, the blue a little lighter; lines differ in marker and dash too, and bars are labelled.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from math import nan
from pathlib import Path
from typing import Any

from pe_onnx.attribution import ATTENTION, ENCODING, MASKS, NORMS, PROJECTIONS, REST
from pe_onnx.bench_report import BenchReport
from pe_onnx.bench_tables import others, phase_name
from pe_onnx.errors import ConfigError, did_you_mean, needs
from pe_onnx.operator_times import Profile

FORMATS = ("png", "svg")
INK = "#787878"
BLUE, VERMILLION, GREEN, PURPLE = "#1F83C8", "#D55E00", "#009E73", "#CC79A7"
STYLES = (
    (BLUE, "o", "-"),
    (VERMILLION, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (INK, "x", "-"),
)
PART_COLOURS = {
    ENCODING: VERMILLION,
    ATTENTION: BLUE,
    PROJECTIONS: GREEN,
    NORMS: PURPLE,
    MASKS: "#8A8A8A",
    REST: "#6E6E6E",
}
TOP_OPERATORS = 8
STYLE: Any = {
    "svg.hashsalt": "pe-onnx",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}
"""matplotlib's settings for every figure of ours."""
DODGE = 1.03
"""Contestants stand this factor apart, so that their intervals can be told apart."""
LOG_FROM = 6.0
"""Times that differ by more than this are drawn on a logarithmic axis."""


def check_plot(path: str | Path) -> Path:
    """The path, where a figure can be drawn to it: before minutes are spent on measuring.

    Raises ConfigError for another ending, MissingDependencyError where matplotlib is missing.
    """
    path = Path(path)
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        hint = did_you_mean(ending, FORMATS)
        raise ConfigError(f"plot = {str(path)!r} must end in .png or .svg{hint}")
    with needs("a plot", "'pe-onnx[plot]'"):
        import matplotlib  # noqa: F401
    return path


def draw(report: BenchReport, path: str | Path) -> bytes:
    """The figure for ``write_report``; raises what ``rendered`` raises."""

    def fill(figure: Any) -> None:
        panels = 2 if report.profile else 1
        figure.set_size_inches(5.6 * panels, 3.9)
        grid = figure.subplots(1, panels, squeeze=False)
        _decode(grid[0][0], report)
        if report.profile:
            _operators(grid[0][1], report.profile[-1])

    return rendered(path, fill)


def rendered(path: str | Path, fill: Callable[[Any], None]) -> bytes:
    """What ``fill`` draws into an empty figure: PNG or SVG by the path's ending, the same bytes for the same drawing.

    Raises what ``check_plot`` raises. Neither pyplot nor the backend of whoever calls is touched.
    """
    form = check_plot(path).suffix.removeprefix(".").lower()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        image = BytesIO()
        date: dict[str, Any] = {"metadata": {"Date": None}} if form == "svg" else {}
        figure.savefig(image, format=form, transparent=True, dpi=160, **date)
    return image.getvalue()


def _decode(axes: Any, report: BenchReport) -> None:
    for i, figures in enumerate(report.contestants):
        color, marker, line = STYLES[i % len(STYLES)]
        aside = DODGE ** (i - (len(report.contestants) - 1) / 2)
        depths = [d.depth_tokens * aside for d in figures.decode]
        medians = [d.median_ms for d in figures.decode]
        intervals = [d.interval_ms or (nan, nan) for d in figures.decode]  # of a few steps no bar is drawn
        below = [median - low for median, (low, _) in zip(medians, intervals, strict=True)]
        above = [high - median for median, (_, high) in zip(medians, intervals, strict=True)]
        axes.errorbar(
            depths,
            medians,
            yerr=[below, above],
            color=color,
            marker=marker,
            markersize=5,
            linestyle=line,
            linewidth=1.8,
            capsize=3,
            label=figures.name,
        )
    values = [d.median_ms for f in report.contestants for d in f.decode]
    if max(values) > LOG_FROM * min(values):
        from matplotlib import ticker

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.15 * max(max(d.interval_ms or (d.median_ms,)) for f in report.contestants for d in f.decode))
    if len(report.depths) > 1:
        axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(report.depths, [f"{depth:,}" for depth in report.depths])
    axes.margins(x=0.08)
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("decode, ms per token")
    axes.set_title("Decode step, median and its 95 % interval", fontsize=10.5, loc="left")
    if len(report.contestants) > 1:
        columns = min(len(report.contestants), 4)
        place = "outside lower left"  # where no line of the grid goes through it
        axes.figure.legend(loc=place, ncols=columns, frameon=False, labelcolor=INK)
    else:
        axes.annotate(report.contestants[0].name, (0.02, 0.96), xycoords="axes fraction", va="top", color=STYLES[0][0])


def _operators(axes: Any, profile: Profile) -> None:
    shown = [(o.operator, o.part, o.us, o.share) for o in profile.operators[:TOP_OPERATORS]]
    shown += [(name, part, us, share) for name, part, _, us, share in others(profile, TOP_OPERATORS)]
    ms = [us / 1000 for _, _, us, _ in shown]
    bars = axes.barh(range(len(shown)), ms, color=[PART_COLOURS.get(part, INK) for _, part, _, _ in shown], height=0.7)
    labels = [f" {share:.1%}{', ' + part if part else ''}" for _, part, _, share in shown]
    axes.bar_label(bars, labels=labels, fontsize=9, color=INK)
    axes.set_yticks(range(len(shown)), [operator for operator, _, _, _ in shown])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.42)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms of a step")
    axes.set_title(f"Time by operator, {phase_name(profile)}", fontsize=10.5, loc="left")
