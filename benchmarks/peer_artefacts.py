"""What the contestants of ``peers.py`` load, made once for each model: each command's time and peak memory measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from peer_checkpoints import make_checkpoint, packaged_gguf
from peer_contestants import RECIPES, Contestant
from peer_environments import environment, last_error

CHECKPOINT = "checkpoint"
POLL_S = 0.02


class SetupError(Exception):
    """Something that a contestant needs cannot be made; the text is the reason."""


class Artefacts:
    """Of one model, in a folder of its own; ``python`` gives the interpreter of an environment."""

    def __init__(self, cache: Path, model: str, threads: int) -> None:
        self.cache, self.folder, self.threads = cache, cache / "models" / model, threads
        self.model = model
        self._failed: dict[str, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def python(self, name: str) -> Path:
        made = environment(name, self.cache)
        if "error" in made:
            raise SetupError(made["error"])
        return Path(made["python"])

    def path(self, name: str) -> Path:
        """Of an artefact, made where it is missing. Raises SetupError with the reason."""
        if name == CHECKPOINT:
            target = self.folder / CHECKPOINT
            if not target.exists():
                click.echo(f"{self.model}: checkpoint", err=True)
                make_checkpoint(self.model, target)
            return target
        recipe = RECIPES[name]
        target, record = self.folder / f"{name}{recipe.suffix}", self.folder / f"{name}.json"
        if name in self._failed:
            raise SetupError(self._failed[name])
        if target.exists() and record.exists():
            return target
        places = {need: self.path(need) for need in recipe.needs}
        places[f"python:{recipe.environment}"] = self.python(recipe.environment)
        places["packaged"] = packaged_gguf()
        click.echo(f"{self.model}: {name}", err=True)
        _remove(target)  # what a killed run left
        measured = self._run(recipe.command(places, target), self.folder / f"{name}.log")
        if "error" in measured:
            _remove(target)
            self._failed[name] = measured["error"]
            raise SetupError(measured["error"])
        record.write_text(json.dumps({**measured, "needs": recipe.needs}) + "\n")
        return target

    def costs(self, contestant: Contestant) -> dict[str, Any]:
        """Time and peak memory of all commands from the checkpoint on, and the bytes of what they end in."""
        stages: dict[str, dict[str, Any]] = {}
        self._add_stages(contestant.artefact, stages)
        path = self.path(contestant.artefact)
        return {
            "export_s": sum(stage["seconds"] for stage in stages.values()),
            "export_peak_bytes": max((stage["peak_bytes"] for stage in stages.values()), default=0),
            "export_stages": stages,
            "file_bytes": size(path),
        }

    def _add_stages(self, name: str, stages: dict[str, dict[str, Any]]) -> None:
        if name == CHECKPOINT:
            return
        record = json.loads((self.folder / f"{name}.json").read_text())
        for need in record["needs"]:
            self._add_stages(need, stages)
        stages[name] = {key: record[key] for key in ("seconds", "peak_bytes")}

    def _run(self, command: list[str], log: Path) -> dict[str, Any]:
        """Wall time and the peak of the resident memory of a command and its children; ``error`` where it failed."""
        variables = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        begin, peak = time.perf_counter(), 0
        with log.open("w") as output:
            child = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
            while child.poll() is None:
                peak = max(peak, tree_bytes(child.pid))
                time.sleep(POLL_S)
        seconds = time.perf_counter() - begin
        if child.returncode:
            return {"error": last_error(log.read_text("utf-8", "replace"))}
        return {"seconds": round(seconds, 2), "peak_bytes": peak}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its children, now; of one without children the most there has been."""
    with suppress(OSError, StopIteration):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        field = "VmRSS" if children else "VmHWM"
        own = 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
        return own + sum(tree_bytes(int(child)) for child in children)
    return 0


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
