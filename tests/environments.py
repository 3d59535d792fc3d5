"""Environments of packages that are not ours, made once a run; skipped where no index can be reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest


def make_python(folder: Path, packages: Sequence[str]) -> None:
    """A virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    pip = [str(interpreter(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    probe = [*pip, "download", "--no-deps", "--dest", str(folder / "probe"), "packaging"]
    if subprocess.run(probe, capture_output=True, timeout=120).returncode != 0:
        pytest.skip("pip reaches no package index")
    made = subprocess.run([*pip, "install", "--no-compile", *packages], capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def make_node(folder: Path, packages: Sequence[str]) -> None:
    """A folder with ``node_modules``. Scripts of the packages are not run: onnxruntime-node's would fetch CUDA."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder.mkdir()
    if subprocess.run(["npm", "view", packages[0], "version"], capture_output=True, timeout=120).returncode != 0:
        pytest.skip("npm reaches no registry")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    made = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr


def run_python(folder: Path, code: str, stdin: str = "") -> str:
    """Standard output of the code in an environment, with none of ours in sight."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(interpreter(folder)), "-c", code]
    ran = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout
