"""Figures are made, say what their axes are, and can be read on light and on dark pages."""

from __future__ import annotations

import itertools
from io import BytesIO

import pytest
from PIL import Image

from pe_onnx.bench_report import BenchReport, Decode, Figures
from pe_onnx.bench_tables import markdown, summary, tables
from pe_onnx.errors import ConfigError
from pe_onnx.operator_times import OperatorTime, Profile
from pe_onnx.plots import INK, PART_COLOURS, STYLES, draw


def report(depths: tuple[int, ...] = (128, 1024), contestants: int = 2, profiled: bool = True) -> BenchReport:
    def decode(depth: int, factor: float) -> Decode:
        ms = factor * (4 + depth / 512)
        return Decode(depth, ms, (0.97 * ms, 1.04 * ms), ms, 1.2 * ms, 1.6 * ms, 120, 0.03, "precision")

    figures = [
        Figures(f"bundle_{i}", 0.3, 3, 900.0, (880.0, 930.0), 140.0, (138.0, 143.0), 9, peak_memory_bytes=10**8)
        for i in range(contestants)
    ]
    for i, one in enumerate(figures):
        one.decode = [decode(depth, 1 + i) for depth in depths]
    made = BenchReport("b", "CPUExecutionProvider", 0, list(depths), False, 128, False, 30, 0.03, figures, {}, {})
    if profiled:
        operators = [OperatorTime("projections", f"MatMul{i}", 3, 100.0 - i, 0.05) for i in range(20)]
        made.profile = [Profile("decode", depths[-1], 20, 2000.0, 5.0, {"encoding": 0.1, "rest": 0.9}, operators)]
    return made


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize(
    ("depths", "contestants", "profiled"), [((128, 1024, 8192), 3, True), ((7,), 1, False), ((7, 9), 6, True)]
)
def test_figures_are_made(ending: str, depths: tuple[int, ...], contestants: int, profiled: bool) -> None:
    content = draw(report(depths, contestants, profiled), f"figure.{ending}")
    if ending == "png":
        image = Image.open(BytesIO(content)).convert("RGBA")
        assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]  # the page shows through
        assert image.width > 600 * (1 + profiled)
    else:
        text = content.decode()
        assert draw(report(depths, contestants, profiled), "again.svg") == content
        for words in ("tokens in the cache", "decode, ms per token", *(["ms of a step"] if profiled else [])):
            assert words in text  # matplotlib writes what it draws as a comment beside the outlines


def test_what_the_caller_set_of_matplotlib_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's backend among it, which pyplot would take from it."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    before = dict(matplotlib.rcParams)
    draw(report(), "figure.png")
    assert dict(matplotlib.rcParams) == before


def test_a_median_without_an_interval_has_no_bar() -> None:
    """The figure is that of any interval as narrow as the line, but without its caps."""
    made = report(contestants=1, profiled=False)
    for d in made.contestants[0].decode:
        d.interval_ms = None
    without = draw(made, "figure.svg")
    for d in made.contestants[0].decode:
        d.interval_ms = (d.median_ms, d.median_ms)
    assert len(without) < len(draw(made, "figure.svg"))


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    """WCAG 2's."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_contrast_on_light_and_dark_pages(page: str) -> None:
    assert contrast(INK, page) >= 4.1
    for color in {color for color, _, _ in STYLES} | set(PART_COLOURS.values()):
        assert contrast(color, page) >= 3.0, color


def test_lines_differ_in_more_than_colour() -> None:
    assert len({marker for _, marker, _ in STYLES}) == len(STYLES)
    assert all(a[1:] != b[1:] for a, b in itertools.pairwise(STYLES))


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.pgn"])
def test_another_ending_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        draw(report(), name)


def test_tables_are_markdown() -> None:
    text = markdown(report())
    for table in tables(report()):
        assert table.title in text
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert "| bundle_0 | 128 | 4.25 | 4.12..4.42 | 5.1 | 6.8 | 120 | precision | - |" in text
    assert "11 others" not in text
    assert "10 others" in text
    assert summary(report()) in text


def test_the_summary_says_what_ended_it() -> None:
    made = report()
    made.prompts_ended_by, made.prompts_precision = "precision", 0.01
    assert "within the precision of 3%" in summary(made)
    made.contestants[0].decode[1].ended_by, made.contestants[0].decode[1].precision = "budget", 0.08
    assert "The budget of 30 s ended 1 of 3 measurements; the widest 95 % interval is +-8.0%" in summary(made)
