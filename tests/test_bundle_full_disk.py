"""A disk that is full, or a file that may not grow, leaves the old bundle or none."""

from __future__ import annotations

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from conftest import Bundles, Cli
from folder_contents import names, snapshot
from small_bundle import held


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
WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_bundle import write
write(Path(sys.argv[2]), "x" * 1000)
"""
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
    for preset, reason in (
        (["--preset", "tiny"], "File too large"),
        ([], "no room for it"),
    ):  # weights in the file; beside it
        line = ("export", "--encoding", "alibi", *preset, "-o", tmp_path / "b", "--force")
        result = cli(*line, preexec_fn=limit_files)
        assert result.stderr.startswith(f"pe-onnx: cannot write {tmp_path / 'b'}: {reason}")
        assert result.stderr.count("\n") == 1
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
        command = [sys.executable, "-B", "-c", main, "export", "--encoding", "alibi", "--preset", "tiny"]
        command += ["-o", output, "--force"]
        result = full_disk(tmp_path, room_bytes, old, command)
        assert result.stderr == f"pe-onnx: cannot write {output}: No space left on device\n"
        assert result.returncode == 1
        assert sorted(result.stdout.splitlines()) == listing(old)
