"""`pe-onnx export`: what it says, what it keeps, and whose code it never runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from command_line import refused
from conftest import Bundles, Cli
from folder_contents import snapshot


def test_an_existing_bundle_is_kept_without_force(run: Cli, bundles: Bundles, tmp_path: Path) -> None:
    shutil.copytree(bundles("rope"), tmp_path / "b")
    before = snapshot(tmp_path)
    refused(run("export", "--encoding", "alibi", "-o", "b"), 2, "output b exists", "--force")
    assert snapshot(tmp_path) == before


def test_code_in_a_checkpoint_is_never_run(cli: Cli, places: dict[str, str], tmp_path: Path) -> None:
    """transformers would ask on the terminal, and run it at a `y`."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(places["llama"], checkpoint)
    values = json.loads((checkpoint / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (checkpoint / "config.json").write_text(json.dumps({**values, "model_type": "custom", "auto_map": own}))
    (checkpoint / "own.py").write_text(
        f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Config: pass\nclass Model: pass"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    result = cli("export", "--model", checkpoint, "-o", tmp_path / "b", stdin="y\n", env=environment)
    assert not (tmp_path / "it ran").exists()
    refused(result, 2, "checkpoint", "code")


def test_export_says_what_it_made_on_stderr_only(run: Cli, tmp_path: Path) -> None:
    result = run("export", "--encoding", "rope:theta=5000,rotary_dim=8", "--set", "num_hidden_layers=1", "-o", "new/b")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"new/b: rope, random weights, ort, fp32, \d+ kB in [\d.]+ s\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]
    shown = json.loads(run("inspect", "new/b", "--json").stdout)
    assert shown["encoding"]["parameters"]["theta"] == {"value": 5000.0, "origin": "given"}
    assert shown["encoding"]["parameters"]["interleaved"] == {"value": False, "origin": "default"}
    assert run("export", "--encoding", "alibi", "-o", "new/b", "--force").returncode == 0
    assert json.loads(run("inspect", "new/b", "--json").stdout)["encoding"]["name"] == "alibi"
