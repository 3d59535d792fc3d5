"""What a folder holds, to compare before and after."""

from __future__ import annotations

import os
from pathlib import Path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
