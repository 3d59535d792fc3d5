"""A folder that looks as if npm had installed the page's packages in it."""

from __future__ import annotations

import json
from pathlib import Path

from pe_onnx.npm_packages import JINJA, ONNXRUNTIME, TOKENIZERS

PACKAGES = (ONNXRUNTIME, TOKENIZERS, JINJA)


def write(folder: Path) -> Path:
    for package in PACKAGES:
        place = folder / "node_modules" / package.name
        for inside in package.files:
            (place / inside).parent.mkdir(parents=True, exist_ok=True)
            (place / inside).write_text(f"{package.spec} {inside}")
        (place / "package.json").write_text(json.dumps({"name": package.name, "version": package.version}))
    return folder
