"""Bundles on disk: what is broken is refused, and a run that fails or is killed leaves the old bundle or none."""

from __future__ import annotations

import errno
import hashlib
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

import pytest

import pe_onnx
from pe_onnx import bundle as bundle_module
from pe_onnx.bundle import MANIFEST, read_bundle, write_bundle
from pe_onnx.errors import BundleError, ConfigError, ExportError

Bundles = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]

WITH_DATA = {"config": {"vocab_size": 8192}}
"""Export options of a model whose weights are more than model.onnx itself may hold."""


def manifest() -> dict[str, Any]:
    """All that a bundle must say, of a model that is not there."""
    return {
        "format": 1,
        "contract": 1,
        "target": "ort",
        "dtype": "fp32",
        "logits": "last",
        "encoding": {"name": "rope", "parameters": {}},
        "model": {
            "layers": 2,
            "kv_heads": 4,
            "head_size": 16,
            "vocab_size": 256,
            "trained_length": 2048,
            "max_length": None,
        },
        "tokenizer": {"kind": "bytes"},
        "source": {"kind": "module", "class": "M"},
        "graph": {"opsets": {"": 23}, "operators": {}, "functions": [], "weight_bytes": 0},
        "tools": {},
    }


def write(folder: Path, text: str, force: bool = False) -> None:
    """A small bundle whose files all hold ``text``."""
    with write_bundle(folder, manifest(), force) as partial:
        (partial / "model.onnx").write_text(text)
        (partial / "model.onnx.data").write_text(text * 1000)
        (partial / "onnx").mkdir()
        (partial / "onnx" / "tokenizer.json").write_text(text)


def held(folder: Path) -> str:
    """The text of a bundle, checked to be whole."""
    read_bundle(folder)
    text = (folder / "model.onnx").read_text()
    assert (folder / "model.onnx.data").read_text() == text * 1000
    assert (folder / "onnx" / "tokenizer.json").read_text() == text
    return text


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


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


# Reading


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
        ("model", {"layers": 2}),
        ("tokenizer", "bytes"),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(real: Path, key: str, value: object, verify: bool) -> None:
    edited(real, lambda values: values.update({key: value}))
    refused(real, key, verify=verify)


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("format", 99), ("contract", 2), ("format", "1")])
def test_a_newer_format_is_refused(real: Path, key: str, value: object) -> None:
    edited(real, lambda values: values.update({key: value}))
    refused(real, f"{key} {value}", "export it again")


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", 1), ("layers", 3), ("kv_heads", 3), ("head_size", 32), ("vocab_size", 300), ("head_size", "16")],
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
    (real / "model.onnx").write_bytes(b"\x08\x0a")
    for options in ((), ("--no-verify",)):
        result = cli("generate", real, "--tokens", "1,2", *options)
        assert result.returncode == 1
        assert result.stderr.startswith("pe-onnx: ")
        assert result.stderr.count("\n") == 1
        assert "model.onnx" in result.stderr


# Writing


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

    place = {"write_text": Path, "mkdir": Path, "os.fsync": os}.get(call, bundle_module)
    with monkeypatch.context() as patch:
        patch.setattr(place, call.removeprefix("os."), fail)
        with pytest.raises(ExportError) as raised:
            write(tmp_path / "b", "two", force=True)
    assert str(raised.value) == f"cannot write {tmp_path / 'b'}: {os.strerror(code)}"
    assert snapshot(tmp_path) == before


def no_exchange(a: Path, b: Path) -> bool:
    """A system that cannot swap two folders: macOS, NFS, and others."""
    return False


def test_force_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_exchange", no_exchange)
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
        patch.setattr(bundle_module, "_exchange", no_exchange)
        patch.setattr(os, "replace", fail_for_the_new_one)
        with pytest.raises(ExportError):
            write(tmp_path / "b", "two", force=True)
    assert snapshot(tmp_path) == before


# What killed runs leave


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["b", "b[1]", "b*", "ü"])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, name: str) -> None:
    stale = tmp_path / f".{name}.partial-{dead_process()}"
    stale.mkdir()
    (stale / "model.onnx").write_text("half")
    write(tmp_path / name, "one")
    assert names(tmp_path) == [name]


def test_what_a_run_with_our_process_id_left_is_removed(tmp_path: Path) -> None:
    """In a container each run may have the same id, 1 say."""
    stale = tmp_path / f".b.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "model.onnx").write_text("half")
    (stale / "of another export").write_text("x")
    write(tmp_path / "b", "one")
    assert held(tmp_path / "b") == "one"
    assert names(tmp_path) == ["b"]
    assert "of another export" not in names(tmp_path / "b")


def test_what_a_live_run_or_another_output_has_is_kept(tmp_path: Path) -> None:
    others = [f".b.partial-{os.getppid()}", f".bb.partial-{dead_process()}", ".b.partial-notes", "b.partial-1"]
    for other in others:
        (tmp_path / other).mkdir()
    write(tmp_path / "b", "one")
    assert names(tmp_path) == sorted(["b", *others])


KILL_AT_EACH_LINE = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_bundle import bundle_module, no_exchange, write
root, old, exchange = Path(sys.argv[2]), sys.argv[3] == "old", sys.argv[4] == "exchange"
traced = (bundle_module.__file__, shutil.__file__, __file__ if "__file__" in globals() else "")
if old:
    write(root / "old" / "b", "one")
count = 0
while True:
    count += 1
    place = root / str(count)
    shutil.copytree(root / "old", place) if old else place.mkdir()
    child = os.fork()
    if child == 0:
        if not exchange:
            bundle_module._exchange = no_exchange
        left = count
        def trace(frame, event, argument):
            global left
            if frame.f_code.co_filename not in traced:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        write(place / "b", "two", force=old)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(status)
"""


@pytest.mark.parametrize("old", ["old", "new"])
@pytest.mark.parametrize("exchange", ["exchange", "rename"])
def test_killed_at_any_line(tmp_path: Path, old: str, exchange: str) -> None:
    """A process is killed before each line of bundle.py and shutil.py in turn that replacing a bundle runs.

    Where the system cannot exchange two folders there is a moment with none, in which the old one has another name.
    """
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_LINE, str(here), str(tmp_path), old, exchange], check=True, timeout=120
    )
    places = [place for place in tmp_path.iterdir() if place.name != "old"]
    assert len(places) > 50
    seen = set()
    for place in places:
        found = held(place / "b") if (place / "b").exists() else "none"
        seen.add(found)
        if found == "none" and old == "old":
            assert exchange == "rename"
            hidden = next(place.glob(".b.old-*"))
            assert held(hidden) == "one"
        write(place / "b", "three", force=True)
        assert held(place / "b") == "three"
        assert names(place) == ["b"], f"after a kill at line event {place.name}"
    assert seen >= ({"one", "two"} if old == "old" else {"none", "two"})


KILL_EXPORTS = """
import os, random, signal, sys, time
from pathlib import Path
import pe_onnx.exporter, transformers
from pe_onnx.cli import main
folder, rng, killed = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
for seed in range(1, 7):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.argv = ["pe-onnx", "export", "--encoding", "rope", "--set", "vocab_size=40000", "--set", f"seed={seed}"]
        sys.argv += ["--set", "num_hidden_layers=1", "-o", str(folder), "--force"]
        main()
        os._exit(0)
    if seed <= 2:
        time.sleep(rng.uniform(0.0, 0.5))
    else:
        while not (begun := any(folder.parent.glob(f".*.partial-{child}"))):
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.0005)
        if not begun:
            continue
        time.sleep(rng.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    bundle = pe_onnx.bundle.read_bundle(folder)
    print(seed, bundle.manifest["source"]["config"]["seed"], *sorted(os.listdir(folder.parent)), flush=True)
print(killed)
"""


def test_exports_killed_at_random_moments(bundles: Bundles, tmp_path: Path, cli: Cli) -> None:
    """``pe-onnx export --force`` over a bundle, killed early and while it writes: always the old one or the new."""
    folder = tmp_path / "place" / "b"
    shutil.copytree(bundles("rope"), folder)
    seed = str(int.from_bytes(os.urandom(4)))
    command = [sys.executable, "-c", KILL_EXPORTS, str(folder), seed]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"random seed {seed}: {result.stderr}"
    *rounds, killed = result.stdout.splitlines()
    assert int(killed) >= 2
    before = 0
    for line in rounds:
        run, held_seed, *_ = line.split()
        assert int(held_seed) in (before, int(run)), f"random seed {seed}: {result.stdout}"
        before = int(held_seed)
    assert cli("export", "--encoding", "rope", "-o", folder, "--force").returncode == 0
    assert names(folder.parent) == ["b"]
    assert pe_onnx.load(folder).generate("hello", 3).tokens == pe_onnx.load(bundles("rope")).generate("hello", 3).tokens


# A disk that is full


def private_mounts() -> list[str] | None:
    """The command that gives a process mounts of its own, None where it is not permitted."""
    for options in (["-m"], ["-r", "-m"]):
        command = ["unshare", *options]
        try:
            tried = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
        except OSError:
            return None
        if tried.returncode == 0:
            return command
    return None


UNSHARE = private_mounts()
WRITE = "import sys; sys.path.insert(0, sys.argv[1]); from test_bundle import *; write(Path(sys.argv[2]), 'x' * 1000)"
LIMIT_BYTES = 200_000


def limit_files() -> None:
    """Files of this process may have LIMIT_BYTES; beyond that a write fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def full_disk(place: Path, size_bytes: int, old: Path | None, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a disk of ``size_bytes`` at ``place``; stdout holds the SHA-256 of what is there after it."""
    assert UNSHARE is not None
    script = 'mount -t tmpfs -o size="$2" tmpfs "$1" || exit 99; test -z "$3" || cp -r "$3" "$1/b"; place="$1"; shift 3'
    script += '; "$@"; code=$?; cd "$place" && find . -type f -exec sha256sum {} + && find . -type d; exit $code'
    values = [str(place), str(size_bytes), str(old or "")]
    return subprocess.run([*UNSHARE, "sh", "-c", script, "sh", *values, *command], capture_output=True, text=True)


def listing(folder: Path) -> list[str]:
    """What full_disk prints for a folder that holds ``folder`` as ``b``."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  ./b/{p.relative_to(folder)}" for p in files]
    return sorted([*sums, ".", "./b"])


def test_a_file_that_grows_too_large_leaves_nothing(tmp_path: Path, bundles: Bundles, cli: Cli) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-B", "-c", WRITE, here, str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_files)
    assert "ExportError: cannot write" in result.stderr
    assert "File too large" in result.stderr
    assert names(tmp_path) == []

    shutil.copytree(bundles("rope"), tmp_path / "b")
    before = snapshot(tmp_path)
    result = cli("export", "--encoding", "alibi", "-o", tmp_path / "b", "--force", preexec_fn=limit_files)
    assert result.stderr == f"pe-onnx: cannot write {tmp_path / 'b'}: File too large\n"
    assert result.returncode == 1
    assert snapshot(tmp_path) == before


def test_the_limit_is_what_fails(tmp_path: Path) -> None:
    """The same two writes succeed with the room they need."""
    subprocess.run([sys.executable, "-c", WRITE, str(Path(__file__).parent), str(tmp_path / "new")], check=True)
    assert held(tmp_path / "new") == "x" * 1000


if UNSHARE is not None:  # a system that does not permit it has the file-size limit alone

    def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
        command = [sys.executable, "-B", "-c", WRITE, str(Path(__file__).parent), str(tmp_path / "new")]
        result = full_disk(tmp_path, 500_000, None, command)
        assert "ExportError: cannot write" in result.stderr
        assert "No space left on device" in result.stderr
        assert result.stdout == ".\n"
        result = full_disk(tmp_path, 2_000_000, None, command)
        assert result.returncode == 0
        assert "./new/model.onnx.data" in result.stdout

    def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, bundles: Bundles) -> None:
        old = bundles("rope")
        room_bytes = sum(p.stat().st_size for p in old.iterdir()) + 250_000
        output = str(tmp_path / "b")
        main = "from pe_onnx.cli import main; main()"
        command = [sys.executable, "-B", "-c", main, "export", "--encoding", "alibi", "-o", output, "--force"]
        result = full_disk(tmp_path, room_bytes, old, command)
        assert result.stderr == f"pe-onnx: cannot write {output}: No space left on device\n"
        assert result.returncode == 1
        assert sorted(result.stdout.splitlines()) == listing(old)
