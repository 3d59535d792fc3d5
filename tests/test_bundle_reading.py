"""Reading a bundle: what is broken, edited, of another format or no bundle is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Bundles, Cli
from small_bundle import write

import pe_onnx
from pe_onnx.bundle import MANIFEST, read_bundle
from pe_onnx.errors import BundleError

WITH_DATA = {"config": {"vocab_size": 8192}}
"""Export options of a model whose weights are more than model.onnx itself may hold."""


def refused(folder: Path, *words: str, verify: bool = True) -> None:
    with pytest.raises(BundleError) as raised:
        read_bundle(folder, verify)
    assert "\n" not in str(raised.value)
    for word in (str(folder), *words):
        assert word in str(raised.value)


@pytest.fixture
def real(bundles: Bundles, tmp_path: Path) -> Path:
    """A copy of an exported bundle with a weights file, to break."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("rope", **WITH_DATA), folder)
    return folder


def test_the_manifest_holds_the_checksum_of_every_other_file(real: Path) -> None:
    files = json.loads((real / MANIFEST).read_text())["files"]
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json"} <= set(files)
    assert set(files) == {str(p.relative_to(real)) for p in real.rglob("*") if p.is_file()} - {MANIFEST}
    for name, entry in files.items():
        content = (real / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_files_in_folders_are_held_too(tmp_path: Path) -> None:
    write(tmp_path / "b", "one")
    assert set(read_bundle(tmp_path / "b").manifest["files"]) == {
        "model.onnx",
        "model.onnx.data",
        "onnx/tokenizer.json",
    }
    (tmp_path / "b" / "onnx" / "tokenizer.json").write_text("two")
    refused(tmp_path / "b", "onnx/tokenizer.json")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_found(real: Path, name: str, place: float) -> None:
    content = bytearray((real / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (real / name).write_bytes(content)
    refused(real, name, "checksum")
    assert read_bundle(real, verify=False).folder == real


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "generation_config.json"])
def test_a_file_that_is_short_long_or_gone_is_found(real: Path, name: str) -> None:
    content = (real / name).read_bytes()
    (real / name).write_bytes(content[:-1])
    refused(real, name, f"{len(content) - 1} bytes", str(len(content)))
    (real / name).write_bytes(content + b"\0")
    refused(real, name, f"{len(content) + 1} bytes")
    (real / name).write_bytes(b"")
    refused(real, name, "0 bytes")
    (real / name).unlink()
    refused(real, name, "missing")


def test_a_bundle_may_be_moved(real: Path, tmp_path: Path) -> None:
    real.rename(tmp_path / "elsewhere")
    assert read_bundle(tmp_path / "elsewhere").target == "ort"


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "no manifest.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a bundle")
    refused(tmp_path / "file" / "below", "not a bundle")
    refused(tmp_path / ("x" * 300), "not a bundle")  # a prompt in the bundle's place


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    edit(values)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"{}"])
def test_a_manifest_that_is_no_manifest_is_refused(real: Path, content: bytes) -> None:
    (real / MANIFEST).write_bytes(content)
    refused(real, "manifest.json")


def test_half_a_manifest_is_refused(real: Path) -> None:
    content = (real / MANIFEST).read_bytes()
    (real / MANIFEST).write_bytes(content[: len(content) // 2])
    refused(real, "manifest.json")


@pytest.mark.parametrize("key", ["format", "contract", "files", "target", "dtype", "logits", "model", "tokenizer"])
def test_a_manifest_without_a_key_is_refused(real: Path, key: str) -> None:
    edited(real, lambda values: values.pop(key))
    refused(real, key)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", None),
        ("files", {"model.onnx": "x"}),
        ("files", {"model.onnx": {"bytes": 5}}),
        ("files", {}),
        ("target", "prtable"),
        ("dtype", "fp99"),
        ("logits", "some"),
        ("model", []),
        ("model", {"vocab_size": 256}),
        ("model", {"vocab_size": 256, "caches": [[4, 0]]}),
        ("tokenizer", "bytes"),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(real: Path, key: str, value: object, verify: bool) -> None:
    edited(real, lambda values: values.update({key: value}))
    refused(real, key, verify=verify)


@pytest.mark.parametrize("bits", [5, "11", [8], True])
def test_bits_of_positions_that_are_none_are_refused(real: Path, bits: object) -> None:
    edited(real, lambda values: values["model"].update(cuda_position_bits=bits))
    refused(real, "model.cuda_position_bits")


@pytest.mark.parametrize("windows", [[1], 5, ["a", 0], [-1, 0], [True, 0], None])
def test_windows_that_are_none_are_refused(real: Path, windows: object) -> None:
    edited(real, lambda values: values["model"].update(windows=windows))
    refused(real, "model.windows")


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("format", 99), ("contract", 2), ("format", "1")])
def test_a_newer_format_is_refused(real: Path, key: str, value: object) -> None:
    edited(real, lambda values: values.update({key: value}))
    refused(real, f"{key} {value}", "export it again")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("caches", [[4, 16]]),
        ("caches", [[4, 16]] * 3),
        ("caches", [[3, 16]] * 2),
        ("caches", [[4, 32]] * 2),
        ("caches", [[4, "16"]] * 2),
        ("vocab_size", 300),
    ],
)
def test_sizes_that_are_not_the_models_are_found(real: Path, key: str, value: object) -> None:
    """The manifest has no checksum of its own; the graph's inputs and outputs tell."""
    edited(real, lambda values: values["model"].update({key: value}))
    with pytest.raises(BundleError):
        pe_onnx.load(real).generate([1, 2, 3], 2)


@pytest.mark.parametrize(("key", "value"), [("dtype", "fp16"), ("logits", "all")])
def test_kinds_that_are_not_the_models_are_found(real: Path, key: str, value: str) -> None:
    edited(real, lambda values: values.update({key: value}))
    with pytest.raises(BundleError):
        pe_onnx.load(real).generate([1, 2, 3], 2)


def test_a_broken_model_is_one_line_without_the_checksums_too(real: Path, cli: Cli) -> None:
    for graph in ("model.onnx", "runtime.onnx"):
        (real / graph).write_bytes(b"\x08\x0a")
    for graph, *options in (("model.onnx",), ("runtime.onnx", "--no-verify")):
        result = cli("generate", real, "--tokens", "1,2", *options)
        assert result.returncode == 1
        assert result.stderr.startswith("pe-onnx: ")
        assert result.stderr.count("\n") == 1
        assert graph in result.stderr
