"""A comparison as figures: bits per byte by length and by position, decode and prefill against length.

Each is one SVG that stands in a page: text stays text in the page's own font, ink is the page's (``currentColor``), and
nothing refers to anything outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pe_onnx.comparison_figures import AtLength, Comparison, Contestant
from pe_onnx.plots import DODGE, INK, LOG_FROM, STYLES, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.4, 3.8
"""Inches, so that text is as large as the page's on a phone too."""
MORE_STYLES = (
    *STYLES[:4],
    ("#9467D8", "v", "-"),
    ("#A8780A", "P", "--"),
    (INK, "x", "-."),
    ("#D6336C", "*", ":"),
    ("#0E8F9C", "h", "-"),
)
"""Those of a bench and others, with as much contrast on light and on dark pages."""
WIDE_NAME = 16
"""Characters from which on a legend has two columns."""


class Plot(NamedTuple):
    """A figure in a page."""

    title: str
    caption: str
    svg: str


def plots(report: Comparison) -> Iterator[Plot]:
    """What there are figures for."""
    longest = report.lengths[-1]
    if any(c.by_position for c in report.contestants):
        yield Plot(
            "Bits per byte by length of the window",
            "Lower is better. A line that ends is an encoding that takes no longer text.",
            _lines(report, "bits", "bits per byte", lambda row: row.bits_per_byte),
        )
        yield Plot(
            "Bits per byte by position",
            f"In windows of {longest:,} tokens, or of as many as the encoding takes: where it breaks.",
            _positions(report),
        )
    yield Plot(
        "Decode",
        "Milliseconds for the token at a length, the others in the cache; median and its 95 % interval.",
        _lines(report, "decode", "ms per token", lambda row: row.decode_ms, lambda row: row.decode_interval_ms),
    )
    yield Plot(
        "Prefill",
        "Tokens per second of a prompt of the length; median and its 95 % interval.",
        _lines(
            report,
            "prefill",
            "tokens per second",
            lambda row: row.prefill_tokens_per_s,
            lambda row: row.prefill_interval_tokens_per_s,
        ),
    )


def picture(encoding: Any, name: str) -> str:
    """An encoding's own picture (``encoding_pictures``)."""
    from pe_onnx.encoding_pictures import draw

    return _svg(lambda figure: draw(encoding, figure), name)


def _lines(
    report: Comparison,
    name: str,
    unit: str,
    value: Callable[[AtLength], float | None],
    interval: Callable[[AtLength], tuple[float, float] | None] | None = None,
) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, c in enumerate(report.contestants):
            aside = DODGE ** (i - (len(report.contestants) - 1) / 2) if interval is not None else 1.0
            rows = [row for row in c.lengths if value(row) is not None]
            lengths = [row.length_tokens * aside for row in rows]
            values = [value(row) or 0.0 for row in rows]
            axes.plot(lengths, values, **_style(i), label=_label(c, report))
            for x, span in zip(lengths, map(interval, rows) if interval is not None else (), strict=False):
                if span is not None:  # of a few samples no bar is drawn
                    axes.plot([x, x], span, color=_style(i)["color"], alpha=0.5, linewidth=1.2)
        every = [y for c in report.contestants for row in c.lengths if (y := value(row)) is not None]
        if every and min(every) > 0 and max(every) > LOG_FROM * min(every):
            _logarithmic(axes)
        elif interval is not None and every:
            axes.set_ylim(0, 1.25 * max(every))  # a bar of a disturbed measurement may leave the figure
            axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(report.lengths, [f"{length:,}" for length in report.lengths])
        _finish(figure, axes, report, "length, tokens", unit)

    return _svg(draw, name)


def _positions(report: Comparison) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, c in enumerate(report.contestants):
            middles = [(bucket.begin + bucket.end) / 2 for bucket in c.by_position]
            axes.plot(middles, [b.bits_per_byte for b in c.by_position], **_style(i), label=_label(c, report))
        axes.set_xlim(0, max((b.end for c in report.contestants for b in c.by_position), default=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _finish(figure, axes, report, "position in the window", "bits per byte")

    return _svg(draw, "positions")


def _style(i: int) -> dict[str, Any]:
    color, marker, line = MORE_STYLES[i % len(MORE_STYLES)]
    return {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.6}


def _label(c: Contestant, report: Comparison) -> str:
    """Its name, and where it ends."""
    stops = c.max_length is not None and c.max_length < report.lengths[-1]
    return f"{c.name} (to {c.max_length:,})" if stops else c.name


def _logarithmic(axes: Any) -> None:
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")


def _finish(figure: Figure, axes: Any, report: Comparison, x: str, y: str) -> None:
    if report.trained_length is not None:
        axes.axvline(report.trained_length, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        place = (report.trained_length, 1.0)
        axes.annotate(
            "trained length",
            place,
            (3, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8.5,
            va="bottom",
            ha="center",
        )
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    names = [_label(c, report) for c in report.contestants]
    columns = 2 if max(map(len, names)) > WIDE_NAME else 3
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _svg(draw: Callable[[Figure], None], name: str) -> str:
    """The figure that ``draw`` fills, as an element of a page."""
    import matplotlib

    sizes: list[float] = []

    def fill(figure: Figure) -> None:
        figure.set_size_inches(WIDTH, HEIGHT)
        draw(figure)
        sizes.append(96 * figure.get_size_inches()[0])

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = rendered(f"{name}.svg", fill).decode()
    return _for_page(svg, name, sizes[0])


def _for_page(svg: str, name: str, width: float) -> str:
    """Without the file's head, metadata and fonts, and the names of its parts made this figure's own.

    width: CSS pixels of its natural size, which the page's rules know as ``--width``.
    """
    begin, end = svg.index("<svg"), svg.index(">", svg.index("<svg"))
    head = re.sub(r'\s(?:width|height|xmlns(?::xlink)?|version)="[^"]*"', "", svg[begin + len("<svg") : end])
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[end:], flags=re.DOTALL)
    for own in ('\\bid="', 'href="#', r"url\(#"):
        body = re.sub(f"({own})", rf"\g<1>{name}-", body)
    body = re.sub(
        r"font-family: [^;\"]*;?|font: (?=[\d.]+px)", lambda m: "font-size: " * m[0].startswith("font:"), body
    )
    body = re.sub(r"(font-size: [\d.]+px) [^;\"]*", r"\1", body)
    body = body.replace("xlink:href", "href").replace(INK.lower(), "currentColor")
    return f'<svg role="img" style="--width: {width:.0f}px"{head}{body}'
