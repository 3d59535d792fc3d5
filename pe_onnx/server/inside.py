"""A bundle that is served must not reach beyond its folder: it may come from anybody."""

from __future__ import annotations

from pathlib import Path

from pe_onnx.errors import BundleError


def check_inside(folder: Path) -> None:
    """Raises BundleError for a link out of the folder, or what is no file: before anything of it is read.

    Names with ``..`` are refused where the manifest is read, locations of weights by onnxruntime.
    """
    place = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.resolve().is_relative_to(place):
            raise BundleError(f"bundle {folder}: {name} is a link out of the folder; serve a copy of the bundle")
        if not path.is_file() and not path.is_dir():
            raise BundleError(f"bundle {folder}: {name} is no file")
