"""Writing a bundle: what it may replace, and that a run that fails leaves the old one or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from folder_contents import names, snapshot
from small_bundle import held, manifest, no_exchange, write

from pe_onnx import bundle as bundle_module
from pe_onnx import placing
from pe_onnx.bundle import write_bundle
from pe_onnx.errors import ConfigError, ExportError


def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    write(tmp_path / "b", "one")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="exists; give another -o, or --force"):
        write(tmp_path / "b", "two")
    assert snapshot(tmp_path) == before


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", "one")
    assert held(tmp_path / "b") == "one"
    assert names(tmp_path) == ["b"]


def test_force_replaces_and_leaves_no_other_name(tmp_path: Path) -> None:
    write(tmp_path / "b", "one")
    (tmp_path / "b" / "of the old one").write_text("x")
    write(tmp_path / "b", "two", force=True)
    assert held(tmp_path / "b") == "two"
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["manifest.json", "model.onnx", "model.onnx.data", "onnx"]


def test_force_replaces_a_corrupted_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b", "one")
    (tmp_path / "b" / "model.onnx").write_text("broken")
    write(tmp_path / "b", "two", force=True)
    assert held(tmp_path / "b") == "two"


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {"manifest.json": '{"name": "my web app", "version": "1.0"}', "app.js": "years of work"},
        {"manifest.json/thesis.txt": "years of work"},
    ],
    ids=["files", "another manifest", "a folder named so"],
)
def test_what_is_no_bundle_is_not_replaced(tmp_path: Path, files: dict[str, str], force: bool) -> None:
    for name, text in files.items():
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError):
        write(tmp_path / "b", "one", force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [True, False])
def test_a_file_is_not_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "b").write_text("years of work")
    with pytest.raises(ConfigError):
        write(tmp_path / "b", "one", force)
    assert snapshot(tmp_path) == {"b": b"years of work"}


def test_an_output_below_a_file_is_wrong_usage(tmp_path: Path) -> None:
    """Known before the export begins, not after it."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError):
        bundle_module.check_output(tmp_path / "file" / "b", force=False)


def test_the_working_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be neither renamed nor replaced: refused before the export, not after it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        bundle_module.check_output(Path(), force=False)


def test_a_link_to_a_bundle_is_replaced_without_leavings(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "place").mkdir()
    write(tmp_path / "store" / "b", "one")
    (tmp_path / "place" / "b").symlink_to(tmp_path / "store" / "b")
    write(tmp_path / "place" / "b", "two", force=True)
    assert held(tmp_path / "place" / "b") == "two"
    assert names(tmp_path / "place") == ["b"]


def write_half(folder: Path, error: BaseException, force: bool) -> None:
    with write_bundle(folder, manifest(), force) as partial:
        (partial / "model.onnx").write_text("half")
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3), MemoryError()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_while_writing_leaves_nothing(tmp_path: Path, error: BaseException, old: bool) -> None:
    if old:
        write(tmp_path / "a" / "b", "one")
    before = snapshot(tmp_path)
    with pytest.raises(type(error)):
        write_half(tmp_path / "a" / "b", error, force=old)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("call", ["write_text", "mkdir", "os.fsync", "sha256", "_put_in_place"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_system_error_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    write(tmp_path / "b", "one")
    before = snapshot(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    place = {"write_text": Path, "mkdir": Path, "os.fsync": os, "sha256": bundle_module}.get(call, placing)
    with monkeypatch.context() as patch:
        patch.setattr(place, call.removeprefix("os."), fail)
        with pytest.raises(ExportError) as raised:
            write(tmp_path / "b", "two", force=True)
    assert str(raised.value) == f"cannot write {tmp_path / 'b'}: {os.strerror(code)}"
    assert snapshot(tmp_path) == before


def test_force_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_exchange", no_exchange)
    write(tmp_path / "b", "one")
    write(tmp_path / "b", "two", force=True)
    assert held(tmp_path / "b") == "two"
    assert names(tmp_path) == ["b"]


def test_a_rename_that_fails_without_exchange_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b", "one")
    before = snapshot(tmp_path)
    replace = os.replace

    def fail_for_the_new_one(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(placing, "_exchange", no_exchange)
        patch.setattr(os, "replace", fail_for_the_new_one)
        with pytest.raises(ExportError):
            write(tmp_path / "b", "two", force=True)
    assert snapshot(tmp_path) == before
