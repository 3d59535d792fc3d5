"""`pe-onnx bench`: its tables, its files, its JSON, and its mistakes in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import snapshot

import pe_onnx
from pe_onnx.cli.bench import command
from pe_onnx.errors import ExportError

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


def test_rows_on_standard_output(run: Cli, bundles: Bundles, tmp_path: Path) -> None:
    result = run("bench", bundles("rope"), *QUICK, "--csv", "-")
    assert result.returncode == 0
    assert {row["measure"] for row in csv.DictReader(io.StringIO(result.stdout))} >= {"decode", "prefill"}
    assert "prefill, tokens/s" in result.stderr
    assert snapshot(tmp_path) == {}


def test_a_file_that_cannot_be_written_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundles: Bundles
) -> None:
    """The disk is full for the rows and a figure: an old figure stays, the others are written, the table is shown."""
    measured = pe_onnx.bench(bundles("rope"), depths=(8,), prompt_tokens=5, budget_s=1e-9, threads=1)
    monkeypatch.setattr("pe_onnx.latency.bench", lambda *_, **__: measured)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.png").write_text("the one before")
    replace = os.replace

    def full(source: object, target: object) -> None:
        if str(target).endswith((".csv", ".png")):
            raise OSError(28, "No space left on device")
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr("os.replace", full)
    files = ["--csv", "b.csv", "--markdown", "b.md", "--plot", "b.png", "--plot", "figures/b.svg"]
    done = CliRunner().invoke(command, [str(bundles("rope")), *files])
    assert isinstance(done.exception, ExportError)
    assert str(done.exception) == "cannot write b.csv: No space left on device; " + (
        "cannot write b.png: No space left on device"
    )
    assert "prefill, tokens/s" in done.stdout
    assert (tmp_path / "b.png").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.md", "b.png", "b.svg", "figures"]


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
    ("bench {rope} --plot {rope}/manifest.json/x.svg", ["--plot", "cannot be written"]),
    ("bench {rope} --csv x --markdown ./x", ["--markdown and --csv name one file, x"]),
    ("bench {rope} --plot a.png --plot ./a.png", ["--plot and --plot name one file, a.png"]),
    ("bench {rope} --csv - --json", ["--csv and --json name one file, -"]),
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
    line: str, words: list[str], code: int, warm_cli: Cli, places: dict[str, str], tmp_path: Path
) -> None:
    result = warm_cli(*(word.format_map(places) for word in shlex.split(line)), cwd=tmp_path)
    refused(result, code, *words)
    assert snapshot(tmp_path) == {}
