"""The command line from a process that has PyTorch loaded, and the one line that a refusal is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import Cli, Result

WARM_SERVER = """
import json, os, sys, tempfile, traceback
import pe_onnx.exporter, pe_onnx.models.bridge, pe_onnx.parity, pe_onnx.reference, transformers
from pe_onnx.cli import main
from torch.onnx._internal.exporter import _compat
import exporter_tables
exporter_tables.keep(filled=True)
for line in sys.stdin:
    folder, args, text, env = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in range(3)]
    files[2].write(text.encode())
    files[2].seek(0)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(env)
        os.dup2(files[2].fileno(), 0)
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        sys.stdin, sys.argv, code = open(0), ["pe-onnx", *args], 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files[:2]:
        file.seek(0)
        texts.append(file.read().decode())
    print(json.dumps([code, *texts]), flush=True)
"""


@contextmanager
def warm_process() -> Iterator[Cli]:
    """Runs each command line in a process of its own, forked from one that has loaded PyTorch."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        [sys.executable, "-c", WARM_SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(*args: object, cwd: Path, stdin: str = "", env: dict[str, str] | None = None) -> Result:
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps([str(cwd), list(map(str, args)), stdin, env or {}]), file=server.stdin, flush=True)
            code, out, err = json.loads(server.stdout.readline())
            return Result(list(map(str, args)), code, out, err)

        yield run
        assert server.stdin is not None
        server.stdin.close()


def refused(result: Result, code: int, *words: str) -> None:
    """One line that names what is wrong, no traceback, nothing on stdout."""
    assert result.stderr.startswith("pe-onnx: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    assert result.stdout == ""
    assert result.returncode == code, result.stderr
    for word in words:
        assert word in result.stderr
