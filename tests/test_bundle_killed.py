"""A run that is killed while it writes a bundle leaves the old one or none, and the next one cleans up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Bundles, Cli
from folder_contents import names
from small_bundle import held, write

import pe_onnx


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
from pe_onnx import bundle as bundle_module, placing
from small_bundle import no_exchange, write
root, old, exchange = Path(sys.argv[2]), sys.argv[3] == "old", sys.argv[4] == "exchange"
traced = (bundle_module.__file__, placing.__file__, shutil.__file__, __file__ if "__file__" in globals() else "")
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
            placing._exchange = no_exchange
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
    """A process is killed before each line of bundle.py, placing.py and shutil.py in turn that replacing a bundle runs.

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


@pytest.mark.slow
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
    assert cli("export", "--encoding", "rope", "--preset", "tiny", "-o", folder, "--force").returncode == 0
    assert names(folder.parent) == ["b"]
    assert pe_onnx.load(folder).generate("hello", 3).tokens == pe_onnx.load(bundles("rope")).generate("hello", 3).tokens
