"""The file is the registration: what stands in a folder under a name is what the tool knows by that name.

A name is a file's stem, a command-line word and a registered name at once, in snake_case. Files that begin with an
underscore are not registered. ``PE_ONNX_PATH`` lists further folders that are laid out like the package: a file
``encodings/mine.py`` in one of them is the encoding ``mine``.
"""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path
from types import ModuleType

from pe_onnx.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parent
PATH_VARIABLE = "PE_ONNX_PATH"


def folder(package: str) -> Path:
    """The folder of a sub-package such as ``encodings`` or ``custom_ops``, without importing it."""
    inside = ROOT / package.replace(".", "/")
    return inside if inside.is_dir() else ROOT.parent / package.replace(".", "/")


def folders(package: str) -> list[Path]:
    """The sub-package's folder, and those of the user's that ``PE_ONNX_PATH`` names.

    Raises ConfigError for an entry that is no folder.
    """
    entries = [Path(entry) for entry in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if entry]
    for entry in entries:
        if not entry.is_dir():
            raise ConfigError(f"{PATH_VARIABLE} names {entry}, which is no folder")
    return [folder(package), *(entry / package for entry in entries)]


def files(package: str) -> dict[str, Path]:
    """Registered name to file, sorted by name. Raises ConfigError for a name that two files claim."""
    found: dict[str, Path] = {}
    for place in folders(package):
        for path in place.glob("*.py"):
            if path.stem.startswith("_"):
                continue
            if path.stem in found:
                raise ConfigError(f"{path} and {found[path.stem]} claim one name; rename the first")
            found[path.stem] = path
    return dict(sorted(found.items()))


def names(package: str) -> list[str]:
    """The registered names of a sub-package, sorted. Imports nothing."""
    return list(files(package))


def summary(package: str, name: str) -> str:
    """The first line of a registered file's docstring, without importing it."""
    docstring = ast.get_docstring(ast.parse(files(package)[name].read_text("utf-8"))) or ""
    return docstring.split("\n", 1)[0].strip()


def path(package: str, name: str) -> Path:
    """The file that registers a name. Raises ConfigError for a name that is not registered."""
    known = files(package)
    if name not in known:
        what = package.removesuffix("s").replace("_", " ")
        hint = did_you_mean(name, known)
        raise ConfigError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")
    return known[name]


def load(package: str, name: str) -> ModuleType:
    """Import a registered file. Raises ConfigError for a name that is not registered."""
    place = path(package, name).parent
    parent = importlib.import_module(f"pe_onnx.{package}")
    if place != folder(package) and str(place) not in parent.__path__:
        parent.__path__.append(str(place))
    return importlib.import_module(f"pe_onnx.{package}.{name}")
