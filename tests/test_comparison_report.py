"""The HTML report: one file that asks nothing of anybody, whole on a phone and in the dark."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from test_plots import contrast

from pe_onnx.comparison_figures import AtLength, Bucket, Comparison, Contestant
from pe_onnx.comparison_plots import MORE_STYLES
from pe_onnx.comparison_report import to_html
from pe_onnx.config import DecoderConfig

LENGTHS = [128, 256, 2048]
VOID = {"meta", "br", "img", "link"}


def contestant(encoding: str, name: str | None = None, limit: int | None = None, own: int | None = 0) -> Contestant:
    config = DecoderConfig(encoding, max_position_embeddings=256).to_dict()
    made = Contestant(
        name=name or encoding,
        bundle="somewhere",
        encoding=encoding,
        parameters={},
        trained_length=256,
        max_length=limit,
        path_dependent=False,
        target="ort",
        dtype="fp32",
        weight_bytes=4_000_000,
        encoding_weights=own,
        encoding_bytes=None if own is None else 4 * own,
        cache_bytes_per_token=4096,
        config=config,
    )
    for length in LENGTHS:
        row = AtLength(length)
        if limit is not None and length > limit:
            row.cannot = f"takes {limit} tokens at most"
        else:
            row.bits_per_byte, row.decode_ms, row.prefill_tokens_per_s = 2.0 + len(encoding) / length, 0.5, 9000.0
            row.decode_interval_ms = (0.4, 0.6)
            made.by_position = [Bucket(0, 128, 2.5), Bucket(128, min(length, 256), 2.0)]
        made.lengths.append(row)
    return made


def comparison(*contestants: Contestant) -> Comparison:
    return Comparison(
        "a text",
        4096,
        LENGTHS,
        [],
        256,
        "CPUExecutionProvider",
        0,
        60,
        list(contestants),
        {"cores": 2},
        {"pe-onnx": "0"},
    )


class Page(HTMLParser):
    """Every address, every id, every tag that was left open, and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name.rpartition(":")[2] in ("href", "src", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def text() -> str:
    return to_html(
        comparison(
            contestant("learned", limit=256, own=16384),
            contestant("rope", name='<b>x&"y</b>'),
            contestant("t5_bias", own=None),
            contestant("alibi"),
        )
    )


def outside(text: str) -> list[str]:
    """What a browser would ask of somebody for this page."""
    page = Page(text)
    asked = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    asked += [tag for tag in page.tags if tag in ("script", "link", "iframe", "base", "object", "embed", "form")]
    asked += [
        match for match in re.findall(r"url\(([^)]*)\)", text) if not match.strip("'\"").startswith(("#", "data:"))
    ]
    return asked + re.findall(r"@import|https?://|//cdn", text)


def test_nothing_is_asked_of_anybody(text: str) -> None:
    assert outside(text) == []


@pytest.mark.parametrize(
    "part",
    [
        '<img src="https://example.org/x.png">',
        '<img src="/x.png">',
        "<script>fetch('x')</script>",
        '<link rel="stylesheet" href="x.css">',
        "<style>p { background: url(x.png) }</style>",
        "<style>@import 'x.css';</style>",
        '<svg><image xlink:href="x.png"/></svg>',
    ],
)
def test_the_check_finds_requests(part: str, text: str) -> None:
    assert outside(text.replace("</body>", f"{part}</body>"))


def test_the_page_is_well_formed(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert page.tags.count("svg") == 4 + 4


def test_names_are_text(text: str) -> None:
    assert '<b>x&"y</b>' in Page(text).words
    assert "b" not in Page(text).tags


def test_what_is_said(text: str) -> None:
    words = " ".join(Page(text).words.split())
    for said in (
        "cannot",
        "learned takes 256 tokens at most.",
        "16,384",
        "bits per byte",
        "trained length",
        "a text",
        "Cost:",
        "Limits:",
    ):
        assert said in words
    assert "Learned absolute positions" in words


def test_it_fits_a_phone_and_the_dark(text: str) -> None:
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "#787878" not in text
    assert "currentColor" in text


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_contrast_on_light_and_dark_pages(page: str) -> None:
    for color in {color for color, _, _ in MORE_STYLES}:
        assert contrast(color, page) >= 3.0, color


def test_lines_differ_in_more_than_colour() -> None:
    assert len({marker for _, marker, _ in MORE_STYLES}) == len(MORE_STYLES)
    assert all(a[1:] != b[1:] for a, b in itertools.pairwise(MORE_STYLES))


@pytest.mark.parametrize("names", [1, 12])
def test_any_number_of_contestants(names: int) -> None:
    made = [contestant("rope", name=f"rope_{i}") for i in range(names)]
    assert f"rope_{names - 1}" in Page(to_html(comparison(*made))).words


def test_bundles_of_others_have_no_picture() -> None:
    """Of a checkpoint nothing is known but its figures, and of a bundle without a tokenizer no bits."""
    c = contestant("rope", own=None)
    c.config, c.no_bits, c.encoding, c.by_position = None, "has no tokenizer", "something", []
    for row in c.lengths:
        row.bits_per_byte = None
    text = to_html(comparison(c))
    assert Page(text).tags.count("svg") == 2
    assert "has no bits per byte: it has no tokenizer" in text


def test_the_same_figures_make_the_same_page(text: str) -> None:
    made: Any = [comparison(contestant("rope")) for _ in range(2)]
    assert to_html(made[0]) == to_html(made[1])
