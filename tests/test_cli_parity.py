"""`pe-onnx parity`: its table, its JSON, its exit code, and a checkpoint that has gone."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import refused
from conftest import Bundles, Cli


def test_parity_whose_checkpoint_has_gone(run: Cli, places: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(places["llama"], tmp_path / "checkpoint")
    assert run("export", "--model", "checkpoint", "-o", "b").returncode == 0
    passed = run("parity", "b", "--mode", "steps", "--length", 9)
    assert passed.returncode == 0, passed.stderr
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    refused(run("parity", "b", "--mode", "steps"), 2, str(tmp_path / "checkpoint"), "--reference")
    named = run("parity", "b", "--reference", "moved", "--mode", "steps", "--length", 9)
    assert named.returncode == 0, named.stderr


def test_parity_that_fails(run: Cli, bundles: Bundles) -> None:
    """Figures first, verdict second; the exit code and one line on stderr for who reads no table."""
    args = ("parity", bundles("rope"), "--mode", "steps", "--length", 9)
    assert run(*args).returncode == 0
    result = run(*args, "--tolerance", "1e-12")
    assert result.returncode == 1
    assert "steps" in result.stdout
    assert "FAIL" in result.stdout
    assert result.stderr.startswith("pe-onnx: ")
    assert result.stderr.count("\n") == 1


def test_the_command_that_leads_on_asks_the_same(run: Cli, bundles: Bundles, tmp_path: Path) -> None:
    """And can be copied, whatever the folder and the prompt hold."""
    (tmp_path / "a bundle; x").symlink_to(bundles("rope"))
    asked = ("--tolerance", "1e-12", "--seed", "3", "--threads", "1")
    for rows in (("--length", "9"), ("--prompt", "it's a text", "--prompt", "another")):
        result = run("parity", "a bundle; x", "--mode", "steps", *rows, *asked)
        assert result.returncode == 1
        step = shlex.split(result.stderr.rpartition("`pe-onnx ")[2].rstrip("`\n"))
        assert step == ["bisect", "a bundle; x", "--mode", "steps", *rows, *asked]
        assert run(*step).returncode == 1


@pytest.mark.parametrize("tolerance", ["inf", "nan"])
def test_a_tolerance_that_is_none_is_refused(run: Cli, bundles: Bundles, tolerance: str) -> None:
    refused(
        run("parity", bundles("rope"), "--json", "--tolerance", tolerance), 2, f"tolerance = {tolerance}", "at least 0"
    )


@pytest.mark.parametrize(("tolerance", "passed"), [([], True), (["--tolerance", "1e-12"], False)])
def test_parity_in_json(run: Cli, bundles: Bundles, tolerance: list[str], passed: bool) -> None:
    result = run("parity", bundles("rope"), "--mode", "steps", "--mode", "whole", "--length", 9, "--json", *tolerance)
    report = json.loads(result.stdout)
    assert report["passed"] is passed
    assert [mode["mode"] for mode in report["modes"]] == ["steps", "whole"]
    assert result.returncode == (0 if passed else 1)


def test_parity_prints_whole_words(run: Cli, bundles: Bundles) -> None:
    """In the 80 columns of what is no terminal: the names of modes are what a user copies."""
    result = run("parity", bundles("rope", "portable"), "--length", 9)
    assert result.returncode == 0, result.stderr
    assert "…" not in result.stdout
    for word in ("interior_padding", "positions", "near-ties"):
        assert word in result.stdout
