"""The PyTorch side by name: a checkpoint's path, or a module in the user's own code as ``package.module:attribute``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pe_onnx.errors import CheckpointError, ConfigError, did_you_mean

_IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def is_import(text: str, base: Path = Path()) -> bool:
    """Whether a reference names an attribute of a Python module; a path that exists comes first."""
    return bool(_IMPORT.fullmatch(text)) and not (base / text).exists()


def load_reference(text: str, folders: Iterable[Path] = ()) -> Any:
    """``path/to/checkpoint`` to its Path; ``package.module:attribute`` to the ``torch.nn.Module`` of that name.

    The attribute is a module, or a class or function that makes one when it is called without arguments. Its package
    is importable as for ``python -m``: from the working directory, the folders given, or as installed.

    Raises CheckpointError for a path that does not exist, ConfigError where an import or the call fails or makes
    something else.
    """
    if not is_import(text):
        path = Path(text)
        if not path.exists():
            raise CheckpointError(f"reference = {text!r} does not exist; name a checkpoint or module:attribute")
        return path
    from pe_onnx.reference import is_module

    name, _, attribute = text.partition(":")
    for folder in (*folders, Path.cwd()):
        if str(folder.resolve()) not in sys.path:
            sys.path.insert(0, str(folder.resolve()))
    try:
        value: Any = importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"reference = {text!r}: {name} cannot be imported: {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"reference = {text!r}: {name} has no {attribute}{did_you_mean(part, dir(value))}")
        value = getattr(value, part)
    if callable(value) and not is_module(value):
        try:
            value = value()
        except Exception as error:
            raise ConfigError(f"reference = {text!r}: calling {attribute} fails: {_told(error)}") from error
    if not is_module(value):
        kind = type(value).__name__
        raise ConfigError(f"reference = {text!r} must be a torch.nn.Module or a function that makes one, not {kind}")
    return value.eval()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
