"""The page's own modules, run by node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pe_onnx.site import PAGE

NODE = shutil.which("node")


def modules(folder: Path) -> Path:
    """A copy that node takes for ES modules."""
    shutil.copytree(PAGE, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def run(folder: Path, code: str, given: Any = None) -> Any:
    """What ``code``, which sees ``given`` and may ``import`` from the page's folder, hands to ``answer``."""
    assert NODE is not None
    lines = [
        "import fs from 'node:fs';",
        "const given = JSON.parse(fs.readFileSync('given.json', 'utf8'));",
        "const answer = (value) => fs.writeFileSync('answer.json', JSON.stringify(value));",
        code,
    ]
    (folder / "given.json").write_text(json.dumps(given), "utf-8")
    (folder / "script.mjs").write_text("\n".join(lines), "utf-8")
    done = subprocess.run([NODE, "script.mjs"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answer.json").read_text("utf-8"))
