"""The file is the registration: what stands in a folder under a name is what the tool knows by that name.

A name is a file's stem, a command-line word and a registered name at once, in snake_case. Files that begin with an
underscore are not registered.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

from pe_onnx.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parent


def folder(package: str) -> Path:
    """The folder of a sub-package such as ``encodings`` or ``custom_ops``, without importing it."""
    inside = ROOT / package.replace(".", "/")
    return inside if inside.is_dir() else ROOT.parent / package.replace(".", "/")


def names(package: str) -> list[str]:
    """The registered names of a sub-package, sorted. Imports nothing."""
    return sorted(path.stem for path in folder(package).glob("*.py") if not path.stem.startswith("_"))


def summary(package: str, name: str) -> str:
    """The first line of a registered file's docstring, without importing it."""
    docstring = ast.get_docstring(ast.parse((folder(package) / f"{name}.py").read_text("utf-8"))) or ""
    return docstring.split("\n", 1)[0].strip()


def load(package: str, name: str) -> ModuleType:
    """Import a registered file. Raises ConfigError for a name that is not registered."""
    known = names(package)
    if name not in known:
        what = package.removesuffix("s").replace("_", " ")
        hint = did_you_mean(name, known)
        raise ConfigError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")
    return importlib.import_module(f"pe_onnx.{package}.{name}")
