"""``pe-onnx bisect``: what a person reads, one JSON document, and exit codes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
from command_line import refused

Cli = Callable[..., subprocess.CompletedProcess[str]]
Bundles = Callable[..., Path]
LAYER = "decoder.blocks.1.attention"
QUICK = ("--length", 20, "--mode", "whole")


@pytest.fixture(scope="module")
def wrong(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.plant(bundles("rope"), tmp_path_factory.mktemp("planted") / "wrong", planted.theta(LAYER))


def test_the_operator_on_stderr_and_its_inputs_on_stdout(warm_cli: Cli, wrong: Path, tmp_path: Path) -> None:
    result = warm_cli("bisect", wrong, *QUICK, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"pe-onnx: {LAYER}, run ")
    assert result.stderr.count("\n") == 1
    assert "RotaryEmbedding, max abs" in result.stderr
    table = result.stdout.splitlines()
    assert "exceeds its tolerance at position" in table[0]
    assert "inputs of RotaryEmbedding" in table[1]
    assert f"{LAYER}.q_proj/linear" in result.stdout
    assert "Cast <- Cos <- Mul" in result.stdout


def test_json(warm_cli: Cli, wrong: Path, tmp_path: Path) -> None:
    result = warm_cli("bisect", wrong, *QUICK, "--json", cwd=tmp_path)
    assert result.returncode == 1
    found = json.loads(result.stdout)["divergence"]
    assert (found["layer"], found["operator"], found["mode"]) == (LAYER, "RotaryEmbedding", "whole")
    assert len(found["inputs"]) == 3


def test_a_right_bundle(warm_cli: Cli, bundles: Bundles, tmp_path: Path) -> None:
    result = warm_cli("bisect", bundles("rope"), *QUICK, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "no mode that was run exceeds its tolerance" in result.stdout
    result = warm_cli("bisect", bundles("rope"), *QUICK, "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["divergence"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mode", "hole"), ["'hole'", "did you mean 'whole'"]),
        (("--reference", "nowhere"), ["'nowhere'", "does not exist"]),
        (("--length", 1), ["length = 1"]),
    ],
)
def test_mistakes(
    options: tuple[object, ...], words: list[str], warm_cli: Cli, bundles: Bundles, tmp_path: Path
) -> None:
    refused(warm_cli("bisect", bundles("rope"), *options, cwd=tmp_path), 2, *words)
