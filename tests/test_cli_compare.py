"""`pe-onnx compare`: a table, one JSON document, an HTML report, and its mistakes in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import snapshot
from test_comparison import SHORT

from pe_onnx.quality import TEXT

QUICK = ("--text", TEXT, "--length", "24,100", "--tokens", 200, "--budget", 0.01, "--threads", 1)


@pytest.fixture
def two(bundles: Bundles) -> tuple[Path, Path]:
    return bundles("learned", **SHORT), bundles("rope", "portable")


def test_a_table_and_files(warm_cli: Cli, two: tuple[Path, Path], tmp_path: Path) -> None:
    result = warm_cli("compare", *two, *QUICK, "-o", "r.html", "--markdown", "r.md", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for words in ("Bits per byte", "cannot", "takes 64 tokens at most", "Prefill", "Sizes"):
        assert words in " ".join(result.stdout.split())
    assert "…" not in result.stdout
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert "| cannot |" in (tmp_path / "r.md").read_text()
    assert sorted(snapshot(tmp_path)) == ["r.html", "r.md"]


def test_json_is_one_document(warm_cli: Cli, two: tuple[Path, Path], tmp_path: Path) -> None:
    result = warm_cli("compare", *two, *QUICK, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["format"] == 1
    assert [[row["length_tokens"] for row in c["lengths"]] for c in report["contestants"]] == [[24, 100]] * 2
    assert snapshot(tmp_path) == {}


def test_markdown_on_standard_output(warm_cli: Cli, two: tuple[Path, Path], tmp_path: Path) -> None:
    result = warm_cli("compare", *two, *QUICK, "--markdown", "-", cwd=tmp_path)
    assert "| contestant | 24 | 100 |" in result.stdout
    assert "Bits per byte" in result.stderr


MISTAKES = [
    ("compare {rope} --length 1,x", ["--length = '1,x'"]),
    ("compare {rope} --length 1", ["lengths = [1]", "at least 2"]),
    ("compare {rope} --tokens 1", ["tokens = 1"]),
    ("compare {rope} --budget 0", ["budget = 0"]),
    ("compare {rope} --threads -1", ["threads = -1"]),
    ("compare {rope} --provider foo", ["'foo'"]),
    ("compare {rope} --text nothing", ["nothing", "UTF-8"]),
    ("compare {rope} -o {rope}/manifest.json/x.html", ["-o", "cannot be written"]),
    ("compare {rope} -o .", ["is a folder"]),
    ("compare {rope} -o -", ["-o -", "file"]),
    ("compare {rope} --markdown - --json", ["--markdown and --json name one file, -"]),
    ("compare {rope} -o x --markdown ./x", ["--markdown and -o name one file, x"]),
    ("compare --encoding alibo", ["'alibo'", "has no trained weights"]),
    ("compare --encoding rope:theta", ["name=value"]),
    ("compare {rope} --extend", ["--extend", "--extended"]),
]
"""Wrong usage, exit code 2."""
BROKEN = [
    ("compare nothing", ["nothing", "does not exist"]),
    ("compare {rope} {corrupted}", ["corrupted", "model.onnx", "checksum"]),
]
"""A broken bundle, exit code 1."""


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [(*case, 2) for case in MISTAKES] + [(*case, 1) for case in BROKEN],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    line: str, words: list[str], code: int, warm_cli: Cli, places: dict[str, str], tmp_path: Path
) -> None:
    text = ["--text", TEXT] if "{rope}" in line and "--text" not in line else []
    result = warm_cli(*(word.format_map(places) for word in shlex.split(line)), *text, cwd=tmp_path)
    refused(result, code, *words)
    assert snapshot(tmp_path) == {}
