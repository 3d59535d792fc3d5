"""What the tests share: the command line as a user calls it, and bundles exported once a run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("export", ...)`` runs ``pe-onnx export ...`` in a process of its own."""

    def run(*args: object, stdin: str | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", *map(str, args)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600, **kwargs)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``bundles("rope", "ort", preset="tiny", dtype="fp32", ...)``: the folder, exported at the first call."""
    import pe_onnx

    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("bundles")

    def get(encoding: str, target: str = "ort", **options: object) -> Path:
        key = repr((encoding, target, sorted(options.items(), key=str)))
        if key not in made:
            folder = root / str(len(made))
            pe_onnx.export(encoding=encoding, output=folder, target=target, **options)
            made[key] = folder
        return made[key]

    return get


def package_folder(name: str) -> Path:
    """The folder of an installed package that carries a checkpoint, found without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed; `make test` installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent
