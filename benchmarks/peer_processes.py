"""The parent's side of a worker of ``peers.py``: start it, ask it, know whether it is idle when it should be."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from peer_contestants import HERE, Contestant
from peer_environments import without_places

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A worker answered with an error, or died; the text says which."""


class WorkerProcess:
    """A contestant in its own interpreter. ``threads`` goes to the engine and to OpenMP."""

    def __init__(self, contestant: Contestant, python: Path, path: Path, threads: int, log: Path) -> None:
        self.contestant, self.path, self.threads = contestant, path, threads
        self.idle_shares: list[float] = []
        """Of one core, between two requests: what a spinning thread takes from the others."""
        self._idle_from: tuple[float, float] | None = None
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as output:
            self._child = subprocess.Popen(
                [str(python), str(HERE / contestant.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=variables,
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, capacity_tokens: int) -> dict[str, Any]:
        given = {"path": str(self.path), "threads": self.threads, "capacity_tokens": capacity_tokens}
        return self.ask("load", **given, **self.contestant.options)

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer. Raises WorkerError."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._note_idle()
        try:
            self._child.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.contestant.name} died in {op}, exit code {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{op}: {without_places(answer['error'])}")
        self._idle_from = time.perf_counter(), self._cpu_s()
        return answer

    def close(self) -> None:
        if self._child.stdin is not None and self._child.poll() is None:
            self._child.stdin.close()  # the worker's loop ends with it
            try:
                self._child.wait(10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def _note_idle(self) -> None:
        if self._idle_from is not None:
            elapsed = time.perf_counter() - self._idle_from[0]
            if elapsed > 0.5:
                self.idle_shares.append((self._cpu_s() - self._idle_from[1]) / elapsed)

    def _cpu_s(self) -> float:
        try:
            stat = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(stat[11]) + int(stat[12])) / TICKS_PER_S
