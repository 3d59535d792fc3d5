"""The file is the registration: a new file is a new encoding, in the package or in a folder of the user's."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pe_onnx
from pe_onnx import discovery
from pe_onnx.errors import ConfigError

ENCODINGS = discovery.names("encodings")
Cli = Callable[..., "subprocess.CompletedProcess[str]"]

NEW_FILE = '''"""Kerple, the logarithmic kind: a penalty that grows with the logarithm of the distance.

Chi et al. 2022.
"""

import torch

from pe_onnx.encoding import PositionalEncoding


class Mine(PositionalEncoding):
    """weight: its strength."""

    def __init__(self, config, *, weight: float = 2.0):
        super().__init__(config)
        self.weight = weight

    def bias(self, query_positions, key_positions, key_length):
        distance = (query_positions[:, :, None] - key_positions[:, None]).clamp(min=0)
        return -self.weight * torch.log1p(distance.float())[:, None]
'''

USE = """
import sys
from pe_onnx import discovery, encoding
assert discovery.__file__.startswith(sys.argv[1]), discovery.__file__
print(" ".join(discovery.names("encodings")))
print(discovery.summary("encodings", "mine_log"))
import torch
from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder
decoder = Decoder(DecoderConfig(encoding="mine_log", encoding_parameters={"weight": "3"}))
print(decoder.encoding.parameters_used)
ids = torch.tensor([[1, 2, 3, 4, 5]])
with torch.no_grad():
    logits = decoder(ids, torch.arange(5)[None], PlainStep(torch.ones_like(ids)))
    decoder.encoding.weight = 0.0
    other = decoder(ids, torch.arange(5)[None], PlainStep(torch.ones_like(ids)))
print(bool((logits - other).abs().max() > 0.01 * (logits.max() - logits.min())))
"""


def test_a_new_file_is_a_new_encoding(tmp_path: Path) -> None:
    """In a copy of the package, with no other edit: it is listed, built with its parameter, and used."""
    home = Path(inspect.getfile(pe_onnx)).parent
    shutil.copytree(home, tmp_path / "pe_onnx", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "pe_onnx" / "encodings"
    (folder / "mine_log.py").write_text(NEW_FILE)
    (folder / "_shared.py").write_text("raise RuntimeError('a file with an underscore is not registered')\n")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        " ".join(sorted([*ENCODINGS, "mine_log"])),
        "Kerple, the logarithmic kind: a penalty that grows with the logarithm of the distance.",
        "{'weight': 3.0}",
        "True",
    ]


def test_names_follow_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "encodings").mkdir()
    for name in ("b_second.py", "a_first.py", "__init__.py", "_private.py", "notes.txt"):
        (tmp_path / "encodings" / name).write_text("'''Words.\n\nMore.'''\n")
    monkeypatch.setattr(discovery, "ROOT", tmp_path)
    assert discovery.names("encodings") == ["a_first", "b_second"]
    assert discovery.summary("encodings", "a_first") == "Words."
    with pytest.raises(ConfigError, match=r"'rope' \(known: a_first, b_second\)"):
        discovery.load("encodings", "rope")


# ------------------------------------------------------------------------------------------- a folder of the user's own

MINE = '''"""A penalty of `strength` times the square root of the distance."""
from pe_onnx.encoding import PositionalEncoding

class Mine(PositionalEncoding):
    def __init__(self, config, *, strength: float = 1.0):
        super().__init__(config)
        self.strength = strength
    def bias(self, query_positions, key_positions, key_length):
        keys = query_positions.new_ones(1, key_length).cumsum(1) - 1 if key_positions is None else key_positions
        return -self.strength * (query_positions[:, None, :, None] - keys[:, None, None]).clamp(min=0).float().sqrt()
'''


@pytest.mark.parametrize("target", ["ort", pytest.param("portable", marks=pytest.mark.slow)])
def test_ten_lines_are_an_encoding(warm_cli: Cli, tmp_path: Path, target: str) -> None:
    """Listed, exported, proved against PyTorch and run from the command line, with no other edit."""
    assert len([line for line in MINE.splitlines() if line]) <= 10
    (tmp_path / "own" / "encodings").mkdir(parents=True)
    (tmp_path / "own" / "encodings" / "mine.py").write_text(MINE)
    env = {"PE_ONNX_PATH": str(tmp_path / "own")}
    listed = warm_cli("list", "--json", cwd=tmp_path, env=env)
    assert json.loads(listed.stdout)["encodings"]["mine"].startswith("A penalty of")
    bundle = tmp_path / "bundle"
    made = warm_cli("export", "--encoding", "mine:strength=2", "-o", bundle, "--target", target, cwd=tmp_path, env=env)
    assert made.returncode == 0, made.stderr
    assert json.loads((bundle / "manifest.json").read_text())["encoding"] == {
        "name": "mine",
        "parameters": {"strength": {"value": 2.0, "origin": "given"}},
        "path_dependent": False,
        "ignored": {},
    }
    proved = warm_cli("parity", bundle, "--json", cwd=tmp_path, env=env)
    assert proved.returncode == 0, proved.stderr
    assert json.loads(proved.stdout)["passed"]
    generated = warm_cli("generate", bundle, "abc", "--max-new-tokens", "4", cwd=tmp_path, env={"PE_ONNX_PATH": ""})
    assert generated.returncode == 0, generated.stderr  # the bundle itself needs no file

    (tmp_path / "own" / "encodings" / "mine.py").write_text(
        MINE.replace("self.strength = strength", "self.strength = 1")
    )
    broken = warm_cli("parity", bundle, cwd=tmp_path, env=env)
    assert broken.returncode == 1, broken.stdout  # the twin that has lost its parameter
    without = warm_cli("parity", bundle, cwd=tmp_path)
    assert without.returncode == 2
    assert "unknown encoding 'mine'" in without.stderr


def test_a_name_that_two_files_claim_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "rope.py").write_text(MINE)
    monkeypatch.setenv("PE_ONNX_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"encodings/rope.py and .*encodings/rope.py claim one name"):
        discovery.names("encodings")


def test_an_entry_that_is_no_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PE_ONNX_PATH", f"{tmp_path}{os.pathsep}{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match=r"PE_ONNX_PATH names .*nowhere, which is no folder"):
        discovery.names("encodings")


def test_an_empty_folder_adds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PE_ONNX_PATH", str(tmp_path))
    assert discovery.names("encodings") == ENCODINGS
