"""`pe-onnx bench`: its tables, its files, its JSON, and its mistakes in one line."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import snapshot

QUICK = ("--depths", "8,40", "--prompt-tokens", 5, "--budget", 0.1, "--threads", 1)


def test_a_table_and_files(run: Cli, bundles: Bundles, tmp_path: Path) -> None:
    files = ("--csv", "b.csv", "--markdown", "b.md", "--plot", "b.png", "--plot", "b.svg")
    result = run("bench", bundles("rope"), *QUICK, "--compare", bundles("none"), "--profile", *files)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for words in ("prefill, tokens/s", "Ratios of neighbouring times", "Share of time by part", "RotaryEmbedding"):
        assert words in result.stdout
    assert "…" not in result.stdout
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    decode = [row for row in rows if row["measure"] == "decode"]
    assert [(row["depth_tokens"], row["unit"]) for row in decode] == 2 * [("8", "ms"), ("40", "ms")]
    assert all(float(row["low"] or 0) <= float(row["value"]) <= float(row["high"] or "inf") for row in decode)
    assert "| phase | encoding |" in (tmp_path / "b.md").read_text()
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_json_is_one_document(run: Cli, bundles: Bundles) -> None:
    result = run("bench", bundles("rope"), *QUICK, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["format"] == 1
    assert [d["depth_tokens"] for d in report["contestants"][0]["decode"]] == [8, 40]


MISTAKES = [
    ("bench", ["DIR"]),
    ("bench {rope} --depths 1,x", ["--depths = '1,x'", "128,1024"]),
    ("bench {rope} --depths 0", ["--depths = '0'"]),
    ("bench {rope} --precision 0", ["--precision = '0'", "share"]),
    ("bench {rope} --precision 100%", ["precision = 1.0"]),
    ("bench {rope} --precision x", ["--precision = 'x'"]),
    ("bench {rope} --budget 0", ["budget = 0"]),
    ("bench {rope} --budget inf", ["budget = inf"]),
    ("bench {rope} --prompt-tokens 0", ["prompt_tokens = 0"]),
    ("bench {rope} --threads -1", ["threads = -1"]),
    ("bench {rope} --provider foo", ["'foo'"]),
    ("bench {rope} --plot figure.pdf", ["'figure.pdf'", ".png or .svg"]),
    ("bench {rope} --plot nowhere/figure.png", ["nowhere"]),
    ("bench {rope} --csv .", ["is a folder"]),
    ("bench {rope} --markdown {rope}/manifest.json/x.md", ["cannot be written"]),
    ("bench {rope} --reference {llama}", ["--compare torch"]),
    ("bench {rope} --profle", ["--profle", "--profile"]),
]
"""Wrong usage, exit code 2: the command line, and what its one line names."""

BROKEN = [
    ("bench nothing", ["nothing", "does not exist"]),
    ("bench {rope} --compare nothing", ["nothing", "does not exist"]),
    ("bench {corrupted}", ["corrupted", "model.onnx", "checksum"]),
]
"""A broken bundle, exit code 1."""


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [(*case, 2) for case in MISTAKES] + [(*case, 1) for case in BROKEN],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    line: str, words: list[str], code: int, run: Cli, places: dict[str, str], tmp_path: Path
) -> None:
    result = run(*(word.format_map(places) for word in shlex.split(line)))
    refused(result, code, *words)
    assert snapshot(tmp_path) == {}
