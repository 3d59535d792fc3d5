"""The modules of the checkout, and the packages that only the export half may import."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {"pe_onnx": "pe_onnx", "pe_onnx.custom_ops": "custom_ops", "pe_onnx.models": "models"}
"""Package to its folder in the checkout; each holds its sub-packages too."""

EXPORT_HALF = {"torch", "transformers", "safetensors", "gguf", "accelerate", "onnx", "onnxscript", "onnx_ir"}
"""The packages that the runtime half never imports."""


def sources() -> dict[str, Path]:
    """Every module of the checkout by its installed name; the two symlinks are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if (ROOT / folder / parts[0]).is_symlink():
                continue
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()
