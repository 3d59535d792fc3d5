"""A bundle that is served must not reach beyond its folder: it may come from anybody."""

from __future__ import annotations

from pe_onnx.bundle import Bundle
from pe_onnx.errors import BundleError


def check_inside(bundle: Bundle) -> None:
    """Raises BundleError for a file of the bundle that is a link to somewhere else.

    Names with ``..`` are refused where the manifest is read, locations of weights by onnxruntime.
    """
    folder = bundle.folder.resolve()
    for path in sorted(bundle.folder.rglob("*")):
        if not path.resolve().is_relative_to(folder):
            name = path.relative_to(bundle.folder)
            raise BundleError(f"bundle {bundle.folder}: {name} is a link out of the folder; serve a copy of the bundle")
