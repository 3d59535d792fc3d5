"""What a first start leaves beside a bundle: used by the next, never where anything changed, and never missed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import t5_models
from conftest import Bundles
from folder_contents import names, snapshot

import pe_onnx
from pe_onnx import bundle as bundle_module
from pe_onnx import prepared, session
from pe_onnx.bundle import ENCODER, MANIFEST, read_bundle, sha256
from pe_onnx.errors import BundleError
from pe_onnx.kv_cache import make_cache
from pe_onnx.session import Session

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LOAD = """
import sys, pe_onnx
from pe_onnx import prepared
prepared.LEAST_BYTES = prepared.SETTLED_NS = 0
print(pe_onnx.load(sys.argv[1]).generate([3, 1, 4, 1, 5, 9, 2, 6], 8, ignore_eos=True).tokens)
"""


@pytest.fixture(autouse=True)
def every_bundle_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LEAST_BYTES", 0)
    monkeypatch.setattr(prepared, "SETTLED_NS", 0)
    monkeypatch.delenv(prepared.SWITCH, raising=False)


@pytest.fixture
def opened(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each session was opened from, in order: ``file``, or ``bytes`` for a graph that lay prepared."""
    kinds: list[str] = []
    bundles("rope")  # not one of those that the export opens
    real = session.onnxruntime.InferenceSession

    def note(model: str | bytes, *args: Any, **kwargs: Any) -> Any:
        kinds.append("bytes" if isinstance(model, bytes) else "file")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", note)
    return kinds


@pytest.fixture
def folder(bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles("rope"), tmp_path / "b"))


def tokens(folder: Path, **options: Any) -> list[int]:
    return pe_onnx.load(folder, **options).generate(PROMPT, 8, ignore_eos=True).tokens


def graphs(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / prepared.FOLDER).iterdir() if p.name not in (prepared.CHECKED,))


def logits(one: Session) -> np.ndarray[Any, Any]:
    """Those after the prompt."""
    return np.array(make_cache(one).prefill([PROMPT])[0])


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_the_next_start_takes_it_and_computes_the_same(
    target: str, bundles: Bundles, tmp_path: Path, opened: list[str]
) -> None:
    folder = Path(shutil.copytree(bundles("rope", target), tmp_path / "b"))
    opened.clear()
    before = snapshot(folder)
    expected = tokens(folder, prepare=False)
    assert snapshot(folder) == before
    assert tokens(folder) == expected  # leaves it
    assert len(graphs(folder)) == 1
    assert tokens(folder) == expected  # takes it
    assert opened == ["file", "file", "bytes"]
    left = snapshot(folder)
    assert {name: content for name, content in left.items() if not name.startswith(prepared.FOLDER)} == before
    tokens(folder)
    assert snapshot(folder) == left


def test_an_encoder_decoder_with_both_graphs_over_one_file_of_weights(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pe_onnx.writing.EMBED_BELOW_BYTES", 0)
    t5_models.write(tmp_path / "checkpoint", "umt5")
    folder = tmp_path / "b"
    pe_onnx.export(model=tmp_path / "checkpoint", output=folder)
    assert (folder / "model.onnx.data").exists()
    opened.clear()
    expected = tokens(folder, prepare=False)
    assert [tokens(folder), tokens(folder)] == [expected, expected]
    assert opened == ["file"] * 4 + ["bytes"] * 2
    assert [p.name.partition("-")[0] for p in graphs(folder)] == ["decoder_model", "encoder_model"]
    for path in graphs(folder):
        weights = onnx.load(path, load_external_data=False).graph.initializer
        assert {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"} == {
            "model.onnx.data"
        }
    bundle = read_bundle(folder)
    for graph in (ENCODER, bundle.model.name):
        plain, quick = Session(bundle, graph=graph), Session(bundle, graph=graph, prepare=True)
        for a, b in zip(plain.inference.get_outputs(), quick.inference.get_outputs(), strict=True):
            assert (a.name, a.shape, a.type) == (b.name, b.shape, b.type)


def test_logits_are_the_same_to_the_bit(folder: Path) -> None:
    tokens(folder)
    bundle = read_bundle(folder)
    np.testing.assert_array_equal(logits(Session(bundle)), logits(Session(bundle, prepare=True)))


def rewritten(folder: Path, factor: float) -> None:
    """The bundle with its weights multiplied, and its manifest right again."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(factor), tensor.name))
    onnx.save(model, path)


def with_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    path = folder / "model.onnx"
    manifest["files"]["model.onnx"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def test_other_weights_are_prepared_anew(folder: Path, opened: list[str]) -> None:
    tokens(folder)
    first = graphs(folder)
    rewritten(folder, -0.5)
    with_manifest(folder)
    opened.clear()
    expected = tokens(folder, prepare=False)
    assert [tokens(folder), tokens(folder)] == [expected, expected]
    assert opened == ["file", "file", "bytes"]
    assert len(graphs(folder)) == 1  # that of the old weights went
    assert graphs(folder) != first


def test_other_weights_that_the_manifest_does_not_know(folder: Path, opened: list[str]) -> None:
    """Nobody checks them with ``verify=False``: still no graph of the old ones is used."""
    model = pe_onnx.load(folder)
    before = logits(model.session)
    rewritten(folder, -0.5)
    opened.clear()
    model = pe_onnx.load(folder, verify=False)
    assert opened == ["file"]
    assert not np.allclose(logits(model.session), before)


def swapped(path: Path) -> None:
    """One bit of the file's middle flipped; size and the content's time stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_changed_byte_of_a_remembered_file_is_found(folder: Path) -> None:
    """Even where the file's time was set back."""
    tokens(folder)
    swapped(folder / "model.onnx")
    with pytest.raises(BundleError, match=r"checksum of model\.onnx does not match"):
        pe_onnx.load(folder)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose bytes were read."""
    read: list[str] = []

    def note(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr(bundle_module, "sha256", note)
    return read


def test_checked_files_are_read_once(folder: Path, hashed: list[str]) -> None:
    files = sorted(read_bundle(folder, verify=False).manifest["files"])
    tokens(folder)
    assert sorted(hashed) == files
    hashed.clear()
    tokens(folder)
    assert hashed == []
    (folder / files[0]).touch()
    tokens(folder)
    assert hashed == files[:1]
    hashed.clear()
    read_bundle(folder)  # what checks, parity and bench do
    tokens(folder, prepare=False)
    assert sorted(hashed) == sorted(files * 2)


def test_a_copy_is_checked_itself(folder: Path, tmp_path: Path, hashed: list[str], opened: list[str]) -> None:
    tokens(folder)
    expected = tokens(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    hashed.clear()
    opened.clear()
    assert tokens(copy) == expected
    assert opened == ["file"]
    assert len(hashed) == len(read_bundle(copy, verify=False).manifest["files"])


def test_a_file_of_this_moment_is_not_remembered(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another of the same size could follow it within one tick of the file system's clock."""
    monkeypatch.setattr(prepared, "SETTLED_NS", 10**12)
    tokens(folder)
    tokens(folder)
    assert len(hashed) == 2 * len(set(hashed))
    assert not (folder / prepared.FOLDER).exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"model.onnx": 3}', "[" * 100000, '{"model.onnx": ["x", 1, 2, 3, 4]}']
)
def test_a_broken_record_of_checks_counts_for_nothing(text: str, folder: Path, hashed: list[str]) -> None:
    tokens(folder)
    (folder / prepared.FOLDER / prepared.CHECKED).write_text(text)
    hashed.clear()
    tokens(folder)
    assert "model.onnx" in hashed
    hashed.clear()
    tokens(folder)
    assert hashed == []


@pytest.mark.parametrize(
    "damage",
    [
        swapped,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
    ],
    ids=["bit", "short", "empty", "other"],
)
def test_a_damaged_graph_is_made_anew(damage: Callable[[Path], Any], folder: Path, opened: list[str]) -> None:
    expected = tokens(folder)
    (path,) = graphs(folder)
    damage(path)
    opened.clear()
    assert [tokens(folder), tokens(folder)] == [expected, expected]
    assert opened == ["file", "bytes"]


def test_a_graph_that_onnxruntime_refuses_is_not_tried_twice(folder: Path, opened: list[str]) -> None:
    expected = tokens(folder)
    (path,) = graphs(folder)
    from pe_onnx.prepared_graph import _digest

    wrong = path.with_name(f"{path.name.rpartition('-')[0]}-{_digest(b'no graph')}")
    path.rename(wrong)
    wrong.write_bytes(b"no graph")
    opened.clear()
    assert [tokens(folder), tokens(folder)] == [expected, expected]
    assert opened == ["bytes", "file", "file"]


def test_a_graph_that_is_too_large_is_not_kept(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pe_onnx.prepared_graph.MOST_BYTES", 100)
    assert tokens(folder) == tokens(folder)
    assert opened == ["file", "file"]
    assert [p.stat().st_size for p in graphs(folder)] == [0]


def test_another_onnxruntime_or_processor_has_its_own(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens(folder)
    monkeypatch.setattr("pe_onnx.prepared_graph.processor_features", lambda: "another")
    tokens(folder)
    monkeypatch.setattr(session.onnxruntime, "__version__", "9.9")
    tokens(folder)
    assert opened == ["file"] * 3


def test_a_folder_that_cannot_be_written(folder: Path, opened: list[str]) -> None:
    """Root may write anywhere: a file in the folder's place stands for a folder that is read-only."""
    (folder / prepared.FOLDER).write_text("")
    before = snapshot(folder)
    assert tokens(folder) == tokens(folder)
    assert opened == ["file", "file"]
    assert snapshot(folder) == before


def test_a_read_only_folder(folder: Path, opened: list[str]) -> None:
    folder.chmod(0o555)
    try:
        assert tokens(folder) == tokens(folder)
    finally:
        folder.chmod(0o755)
    assert os.geteuid() == 0 or opened == ["file", "file"]


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def child(folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_disk_without_room(folder: Path) -> None:
    """No file may grow beyond 100 bytes: the same tokens, not a word, and nothing half written."""
    expected = f"{tokens(folder, prepare=False)}\n"
    out, err = child(folder, preexec_fn=limit_files).communicate(timeout=100)
    assert (out, err) == (expected, "")
    assert [p.stat().st_size for p in (folder / prepared.FOLDER).iterdir()] in ([], [0])  # at most: there can be none


def test_several_processes_at_once(folder: Path, opened: list[str]) -> None:
    expected = f"{tokens(folder, prepare=False)}\n"
    running = [child(folder) for _ in range(4)]
    assert [one.communicate(timeout=200) for one in running] == [(expected, "")] * 4
    assert not [name for name in names(folder / prepared.FOLDER) if name.startswith(prepared.PARTIAL)]
    opened.clear()
    tokens(folder)
    assert opened == ["bytes"]


def test_a_process_killed_while_it_writes(folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped where its file is whole but not renamed; the next start leaves its own, and clears up later."""
    kill = "\nimport os\nos.replace = lambda a, b: os.kill(os.getpid(), 9)\n"
    for line in (kill, kill + "from pe_onnx import bundle\nbundle.prepared.remember_checked = lambda *a: None\n"):
        program = LOAD.replace("\nprint", line + "print")
        assert subprocess.run([sys.executable, "-c", program, str(folder)]).returncode == -signal.SIGKILL
    left = names(folder / prepared.FOLDER)
    assert len(left) == 2
    assert all(name.startswith(prepared.PARTIAL) for name in left)
    expected = tokens(folder, prepare=False)
    assert [tokens(folder), tokens(folder)] == [expected, expected]
    assert opened[-1] == "bytes"
    assert set(left) < set(names(folder / prepared.FOLDER))  # perhaps somebody is still at it
    monkeypatch.setattr(prepared, "ABANDONED_S", -1.0)
    (folder / MANIFEST).touch()
    swap = graphs(folder)[-1]
    swap.unlink()
    tokens(folder)
    assert not set(left) & set(names(folder / prepared.FOLDER))


@pytest.mark.parametrize("way", ["environment", "argument", "size"])
def test_it_can_be_switched_off(way: str, folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "environment":
        monkeypatch.setenv(prepared.SWITCH, "0")
    if way == "size":
        monkeypatch.undo()
    for _ in range(2):
        tokens(folder, prepare=way != "argument")
    assert not (folder / prepared.FOLDER).exists()


def test_sessions_with_options_of_their_own_do_not_use_it(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    tokens(folder)
    bundle = read_bundle(folder)
    opened.clear()
    Session(bundle)
    Session(bundle, optimize=False, prepare=True)
    Session(bundle, optimize="basic", prepare=True)
    Session(bundle, options=session.RECORD_PLACEMENT, prepare=True)
    Session(bundle, profile=tmp_path / "profile", prepare=True).end_profile()
    assert opened == ["file"] * 5
    Session(bundle, threads=1, prepare=True)
    assert opened[-1] == "bytes"


def test_a_broken_bundle_is_refused_as_ever(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match="onnxruntime cannot load"):
        pe_onnx.load(folder, verify=False)


@pytest.mark.parametrize(("given", "spinning"), [({}, "1000"), ({"session.intra_op.spin_duration_us": "7"}, "7")])
def test_threads_spin_for_a_moment_unless_told_otherwise(given: dict[str, str], spinning: str, folder: Path) -> None:
    options = Session(read_bundle(folder), options=given).inference.get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == spinning
