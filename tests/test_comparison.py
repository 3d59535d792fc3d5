"""Bundles compared: the same bytes at each length, what cannot be had is said, each has the figures it has alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import t5_models
from conftest import Bundles
from test_text_bits import NEAR, WORDS, config_of, pytorch_bits

import pe_onnx
from pe_onnx import comparison
from pe_onnx.comparison import compare, encoding_of
from pe_onnx.comparison_figures import Comparison
from pe_onnx.comparison_tables import markdown, notes, tables
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.quality import TEXT
from pe_onnx.text_bits import Text

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {"config": {"max_position_embeddings": 64}}
LENGTHS = [24, 60, 100]


@pytest.fixture(scope="module")
def folders(bundles: Bundles) -> list[Path]:
    return [bundles("learned", **SHORT), bundles("rope", "portable"), bundles("alibi", "ort")]


@pytest.fixture(scope="module")
def report(folders: list[Path]) -> Comparison:
    return compare(folders, text=TEXT, lengths=LENGTHS, tokens=700, budget_s=0.1, threads=1)


def test_bits_are_pytorchs_over_the_bytes_of_every_length(report: Comparison, folders: list[Path]) -> None:
    assert report.tokens == 700
    ends = [700 // length * length for length in LENGTHS]
    for c, folder in zip(report.contestants, folders, strict=True):
        for row in c.lengths:
            if row.cannot:
                continue
            n = row.length_tokens
            found = pytorch_bits(config_of(folder), WORDS[:700], n)
            of_token = {w * n + 1 + i: found[w, i] for w in range(len(found)) for i in range(n - 1)}
            shared = [b for at, b in of_token.items() if at < min(ends) and all(at % each for each in LENGTHS)]
            assert row.bits_per_byte == pytest.approx(np.mean(shared), abs=NEAR)


def test_bits_are_for_the_bytes_of_the_tokens_that_are_counted(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = np.random.default_rng(0).integers(1, 7, 700)
    monkeypatch.setattr(comparison, "tokenized", lambda bundle, text, tokens: Text(WORDS[:tokens], sizes[:tokens]))
    report = compare(folders[1:2], text=TEXT, lengths=[20, 50], tokens=300, budget_s=0.1, threads=1)
    (c,) = report.contestants
    for row in c.lengths:
        n = row.length_tokens
        found = pytorch_bits(config_of(folders[1]), WORDS[:300], n)
        at = [i for i in range(300) if i % 20 and i % 50]
        want = sum(found[i // n, i % n - 1] for i in at) / sizes[at].sum()
        assert row.bits_per_byte == pytest.approx(want, abs=NEAR)
    held = sizes[:300].reshape(-1, 50)
    first, second, third = c.by_position
    assert (first.begin, first.end, second.begin, third.end) == (0, 20, 20, 50)
    assert first.bits_per_byte == pytest.approx(found[:, :19].sum() / held[:, 1:20].sum(), abs=NEAR)
    assert second.bits_per_byte == pytest.approx(found[:, 19:39].sum() / held[:, 20:40].sum(), abs=NEAR)


def test_bits_by_position(report: Comparison, folders: list[Path]) -> None:
    rope = report.contestants[1]
    assert [(b.begin, b.end) for b in rope.by_position] == [(0, 24), (24, 48), (48, 72), (72, 96), (96, 100)]
    found = pytorch_bits(config_of(folders[1]), WORDS[:700], 100)
    for b in rope.by_position:
        assert b.bits_per_byte == pytest.approx(found[:, max(b.begin - 1, 0) : b.end - 1].mean(), abs=NEAR)
    assert report.contestants[0].by_position[-1].end == 60


def test_what_cannot_be_had_is_said(report: Comparison) -> None:
    learned, rope, _ = report.contestants
    assert [row.cannot for row in learned.lengths] == [None, None, "takes 64 tokens at most"]
    assert (learned.at(100).bits_per_byte, learned.at(100).decode_ms) == (None, None)
    assert all(row.cannot is None for row in rope.lengths)
    assert f"{learned.name} takes 64 tokens at most." in list(notes(report))
    for table in tables(report):
        assert [row[-1] == "cannot" for row in table.rows] == [True, False, False]


def test_times_and_memory(report: Comparison) -> None:
    for c in report.contestants:
        able = [row for row in c.lengths if row.cannot is None]
        assert all(row.decode_ms and row.prefill_tokens_per_s for row in able)
        assert able[-1].peak_memory_bytes is not None
        assert able[-1].peak_memory_bytes > 10**7
        assert c.cache_bytes_per_token == 2 * 2 * 4 * 16 * 4  # layers, keys and values, heads, D, float32


def test_the_encodings_own_weights(report: Comparison, bundles: Bundles) -> None:
    """By hand, and those of the graph that are not constants of the formula."""
    assert [c.encoding_weights for c in report.contestants] == [64 * 64, 0, 0]
    assert [c.encoding_bytes for c in report.contestants] == [4 * 64 * 64, 0, 0]
    t5 = encoding_of(config_of(bundles("t5_bias")).to_dict(), trained=False)
    assert sum(p.numel() for p in t5.parameters()) == 32 * 4


def test_the_document(report: Comparison) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["format"] == 1
    assert values["lengths"] == LENGTHS
    assert values["trained_length"] == 64
    row = values["contestants"][0]["lengths"][-1]
    assert row["length_tokens"] == 100
    assert row["cannot"] == "takes 64 tokens at most"
    assert row["bits_per_byte"] is None
    assert 5 < values["contestants"][1]["lengths"][0]["bits_per_byte"] < 20


def test_tables_are_markdown(report: Comparison) -> None:
    text = markdown(report)
    for table in tables(report):
        assert table.title in text
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_findings_follow_the_figures(report: Comparison) -> None:
    learned, rope, alibi = report.contestants
    first, *_ = report.findings()
    best, worst = sorted((c.at(100).bits_per_byte or math.nan, c.name) for c in (rope, alibi))
    assert first.startswith(f"In windows of 100 tokens {best[1]} needs the fewest bits per byte, {best[0]:.3f}")
    assert f"{worst[1]} the most, {worst[0]:.3f}" in first
    assert f"{learned.name} cannot run so long a text." in list(report.findings())


def test_lengths_are_multiples_of_the_least_trained_one(folders: list[Path], tmp_path: Path) -> None:
    """Those that a text is too short for are left out, and named."""
    (tmp_path / "text").write_bytes(bytes(WORDS[:300]))
    found = compare(folders[:1], text=tmp_path / "text", budget_s=1e-6, threads=1)
    assert (found.lengths, found.left_out, found.trained_length) == ([32, 64, 128, 256], [512], 64)
    assert "The text is too short for windows of 512 tokens." in list(notes(found))


def test_names_differ(folders: list[Path], tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x").symlink_to(folders[1])
    options: dict[str, Any] = {"text": TEXT, "lengths": [4], "tokens": 8, "budget_s": 1e-6, "threads": 1}
    twice = compare([folders[1], folders[1]], **options)
    assert len({c.name for c in twice.contestants}) == 2
    assert twice.contestants[0].at(4).bits_per_byte == twice.contestants[1].at(4).bits_per_byte


def test_mistakes(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lengths": [1]}, "lengths = \\[1\\]"),
        ({"lengths": []}, "lengths = \\[\\]"),
        ({"tokens": 1}, "tokens = 1"),
        ({"threads": -1}, "threads = -1"),
        ({"budget_s": 0}, "budget = 0"),
        ({"text": tmp_path / "text", "lengths": [4, 6]}, "5 tokens, fewer than a length of 6"),
        ({"text": tmp_path / "nothing"}, "cannot be read"),
    ]
    for options, message in wrong:
        with pytest.raises((ConfigError, InputError), match=message):
            compare(folders, **({"text": TEXT} | options))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    t5_models.write(tmp_path / "c", "t5")
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", verify=False)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        compare([tmp_path / "b"], text=TEXT)
