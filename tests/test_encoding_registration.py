"""A file is an encoding: one hook, found by its name, and a new one needs no other edit."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drawn_encodings import ENCODINGS, encoding

import pe_onnx
from pe_onnx import discovery
from pe_onnx.encoding import declared_parameters
from pe_onnx.errors import ConfigError

HOOKS = {"embed": {"embed"}, "rotate": {"tables", "rotate"}, "bias": {"bias"}, "none": set()}


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_is_one_hook_and_a_docstring(name: str) -> None:
    made = encoding(name)
    overridden = {hook for hooks in HOOKS.values() for hook in hooks if hook in vars(type(made))}
    assert overridden == HOOKS[made.hook]
    assert discovery.summary("encodings", name).endswith(".")
    assert made.parameters_used == declared_parameters(type(made))


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("ropee", "rope"), ("alibbi", "alibi"), ("sinusoid", "sinusoidal"), ("t5-bias", "t5_bias")]
)
def test_an_unknown_encoding_gives_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown encoding '{wrong}'; did you mean '{nearest}'") as caught:
        encoding(wrong)
    assert all(name in str(caught.value) for name in ENCODINGS)


@pytest.mark.parametrize("wrong", ["", "__init__", "../encodings/rope", "rope.py", "zzz"])
def test_what_is_no_registered_name_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="unknown encoding"):
        encoding(wrong)


NEW_FILE = '''"""Kerple, the logarithmic kind: a penalty that grows with the logarithm of the distance.

Chi et al. 2022.
"""

import torch

from pe_onnx.encoding import PositionalEncoding


class Kerple(PositionalEncoding):
    """weight: its strength."""

    hook = "bias"

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
print(discovery.summary("encodings", "kerple_log"))
import torch
from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder
decoder = Decoder(DecoderConfig(encoding="kerple_log", encoding_parameters={"weight": "3"}))
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
    (folder / "kerple_log.py").write_text(NEW_FILE)
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
        " ".join(sorted([*ENCODINGS, "kerple_log"])),
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
