"""The proof of the finished bundle: a planted fault in the graph is found before the bundle is in its place."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import onnx_ir as ir
import pytest
import torch
from conftest import Bundles, Cli
from torch import nn

import pe_onnx
from pe_onnx import tracing
from pe_onnx.errors import ExportError
from pe_onnx.models.attention import cached_step
from pe_onnx.models.proof import BEYOND, PROMPT

WINDOW = 40
"""More than the tokens of the proof's first trial: only the one behind a long past sees it."""


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("checkpoint") / "c", "mistral", sliding_window=WINDOW)


def attribute(op_type: str, name: str, change: Callable[[Any], Any]) -> Callable[[ir.Model], None]:
    """A fault: another value of one attribute of the first node of a type."""

    def plant(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == op_type)
        old = node.attributes[name]
        node.attributes[name] = ir.Attr(name, old.type, change(old.value))

    return plant


def swapped_inputs(op_type: str, a: int, b: int) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == op_type)
        first, second = node.inputs[a], node.inputs[b]
        node.replace_input_with(a, second)
        node.replace_input_with(b, first)

    return plant


FAULTS = {
    "window one longer": ("ort", attribute("CachedAttention", "window", lambda w: w + 1)),
    "window dropped": ("ort", attribute("CachedAttention", "window", lambda w: -1)),
    "scale": ("ort", attribute("CachedAttention", "scale", lambda s: 1.1 * s)),
    "scale, portable": ("portable", attribute("MaskedAttention", "scale", lambda s: 1.1 * s)),
    "pairs of the rotation": ("portable", attribute("RotaryEmbedding", "interleaved", lambda i: 1 - i)),
    "sines for cosines": ("ort", swapped_inputs("RotaryEmbedding", 1, 2)),
    "keys for values": ("portable", swapped_inputs("MaskedAttention", 1, 2)),
}


SWEPT = ("window one longer", "scale, portable")
"""The same parts as others on the other target, or by less."""


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if f in SWEPT else ()) for f in FAULTS])
def test_a_fault_in_the_graph_is_found(
    fault: str, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, plant = FAULTS[fault]
    names = tracing.ContractNames

    def planted(*args: Any) -> Callable[[ir.Model], Any]:
        def run(model: ir.Model) -> Any:
            plant(model)
            return names(*args)(model)

        return run

    monkeypatch.setattr(tracing, "ContractNames", planted)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes") as caught:
        pe_onnx.export(model=mistral, output=tmp_path / "out" / "b", target=target)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    if fault != "scale":
        return
    pe_onnx.export(model=mistral, output=tmp_path / "b", target=target, verify=False)  # for the impatient
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["proof"] == {"verified": False}


@pytest.mark.parametrize("target", ["ort", pytest.param("portable", marks=pytest.mark.slow)])
def test_the_manifest_says_what_was_proven(target: str, mistral: Path, tmp_path: Path) -> None:
    proof = pe_onnx.export(model=mistral, output=tmp_path / "b", target=target).manifest["proof"]
    assert proof["verified"]
    assert proof["relative_error"] < proof["allowed"]
    assert proof["on"] == f"rows of {PROMPT + 2} and {PROMPT - 1} tokens and 7 tokens behind {WINDOW + BEYOND}"


def test_a_bundle_that_was_there_stays(
    mistral: Path, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundles("none"), tmp_path / "b")
    before = (tmp_path / "b" / "manifest.json").read_text()
    monkeypatch.setattr("pe_onnx.verification.PROOF", 0.0)
    with pytest.raises(ExportError):
        pe_onnx.export(model=mistral, output=tmp_path / "b", force=True)
    assert (tmp_path / "b" / "manifest.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


class Remembers(nn.Module):
    """A module that breaks the contract: a row's logits hang on its neighbour's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past_key_values: Any
    ) -> Any:
        step = cached_step("ort", attention_mask, input_ids.shape[1], past_key_values)
        x = self.embedding(input_ids)
        x = x + step.attend(0, x, x, x, num_heads=4, kv_heads=4, scale=0.25)
        return self.head(x + x.mean(0, keepdim=True)), step.presents


def test_rows_that_depend_on_each_other_are_found(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not compute"):
        pe_onnx.export(Remembers(), tmp_path / "b", layers=1, kv_heads=4, head_size=16)


def test_the_option_of_the_command_line(tmp_path: Path, run: Cli) -> None:
    result = run("export", "--encoding", "none", "--no-verify", "-o", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "none: exported with --no-verify" in run("inspect", tmp_path / "b").stdout


def test_weights_are_let_go_before_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs the proof maps the file: the module's weights, joined, turned or as they were, must be gone by then."""
    from pe_onnx import exporter, verification

    held: list[weakref.ref[torch.Tensor]] = []
    left: list[tuple[int, ...]] = []
    build, run = exporter.from_config, verification.verify

    def noting(*args: Any, **options: Any) -> Any:
        made = build(*args, **options)
        held.extend(weakref.ref(parameter) for parameter in made.module.parameters())
        return made

    def checking(*args: Any) -> Any:
        left.extend(tuple(kept.shape) for kept in (each() for each in held) if kept is not None)
        return run(*args)

    monkeypatch.setattr(exporter, "from_config", noting)
    monkeypatch.setattr(verification, "verify", checking)
    pe_onnx.export(encoding="rope", output=tmp_path / "b", config={"vocab_size": 12288, "num_key_value_heads": 2})
    assert len(held) > 10
    assert not left
