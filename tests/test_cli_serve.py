"""``pe-onnx serve`` of what it will not serve: wrong options, and bundles that reach out of their folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
import servers
from command_line import refused
from conftest import Bundles, Cli

import pe_onnx
from pe_onnx import prepared
from pe_onnx.bundle import sha256


@pytest.fixture(scope="module")
def bundle(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.with_chat(bundles("rope"), tmp_path_factory.mktemp("served") / "b")


MISTAKES = (
    ("serve nowhere --port 0", ["nowhere is not a bundle"]),
    ("serve {rope} --grace -1 --port 0", ["grace_s = -1"]),
    ("serve {rope} --replicas 2", ["--replicas needs --ray"]),
    ("serve {rope} --port 70000", ["70000"]),
    ("serve {rope} --host 8.8.8.8 --port 0", ["8.8.8.8", "cannot be listened on"]),
    ("serve {rope} --host no.such.host --port 0", ["no.such.host"]),
    ("serve {rope} --slots 0 --port 0", ["slots = 0", "at least 1"]),
    ("serve {rope} --timeout 0 --port 0", ["timeout_s = 0"]),
    ("serve {rope} --max-body 0 --port 0", ["--max-body"]),
    ("serve {rope} --max-length 999999999 --port 0", ["slots of 999999999 tokens", "--slots"]),
    ("serve {portable} --port 0", ["target portable", "--target ort"]),
)


@pytest.mark.parametrize(("line", "parts"), MISTAKES)
def test_mistakes(line: str, parts: list[str], bundles: Bundles, cli: Cli) -> None:
    named = {"rope": bundles("rope"), "portable": bundles("rope", "portable")}
    result = cli(*(part.format(**named) for part in line.split()))
    refused(result, 1 if "nowhere" in line else 2, *parts)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_bundle_is_refused(bundle: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "secret").write_text("{{ 'secret' }}")
    (tmp_path / "b" / name).unlink(missing_ok=True)
    (tmp_path / "b" / name).symlink_to(tmp_path / "secret")
    refused(cli("serve", tmp_path / "b", "--port", 0), 1, name)


def test_nothing_is_written_through_a_link(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "checked.json").write_text("mine")
    (tmp_path / "b" / ".prepared").symlink_to(outside)
    with (tmp_path / "b" / "large").open("wb") as file:
        file.truncate(prepared.LEAST_BYTES)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["files"]["large"] = {"bytes": prepared.LEAST_BYTES, "sha256": sha256(tmp_path / "b" / "large")}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    refused(cli("serve", tmp_path / "b", "--port", 0), 1, ".prepared is a link out of the folder")
    assert pe_onnx.load(tmp_path / "b").generate("x", 2).tokens  # which nobody served
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"checked.json": "mine"}


def test_what_is_no_file_is_refused(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "b" / "manifest.json")
    refused(cli("serve", tmp_path / "b", "--port", 0), 1, "manifest.json is no file")


def test_weights_outside_the_bundle_are_refused(bundles: Bundles, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(bundles("rope"), tmp_path / "b")
    path = tmp_path / "b" / "model.onnx"
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (tmp_path / "outside").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location="../outside", length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    refused(cli("serve", tmp_path / "b", "--port", 0), 1, "onnxruntime cannot load")
