"""What a first start leaves for later ones, in the folder ``.prepared`` of a bundle: nothing a bundle needs.

Two things lie there: which files had the manifest's SHA-256, and the graphs as onnxruntime optimised them
(`prepared_graph`). Both hold for the very files they were made of, told by size, times and inode: whoever writes to a
file, replaces it, or copies the bundle changes one of these, and what was left is not used. The time of the last change
of the inode cannot be set by programs; a file that changed within the last two seconds, the coarsest clock of a file
system, is not remembered. What this does not see is a disk that returns other bytes than were written: ``read_bundle``
and all commands that check read the bytes themselves, only ``load`` trusts what was remembered.

Every file appears whole, by rename. A folder that cannot be written, or a disk that is full, leaves all as it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pe_onnx.machine import umask

FOLDER = ".prepared"
SWITCH = "PE_ONNX_PREPARE"
"""Set to 0, this variable of the environment switches it off: nothing is written, nothing found is used."""

LEAST_BYTES = 16 << 20
"""Smaller bundles gain less than 0.03 s of a start."""
SETTLED_NS = 2_000_000_000
"""Since a file's last change, before its times tell it from an earlier one of the same size."""
ABANDONED_S = 600.0
"""After which an unfinished file is nobody's: one takes less than a second to write."""

CHECKED = "checked.json"
PARTIAL = ".partial-"

State = list[int]
"""Bytes, time of the content, time of the inode, inode: equal for a file that nobody touched."""


def switched_on() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


def worth(bundle: Path, files: Mapping[str, Any]) -> bool:
    """Whether a bundle with these ``files`` of a manifest is large enough; not where the folder is a link, which may
    lead anywhere."""
    large = sum(entry["bytes"] for entry in files.values()) >= LEAST_BYTES
    return switched_on() and large and not (bundle / FOLDER).is_symlink()


def state(path: Path) -> State:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def settled(states: list[State], now_ns: int) -> bool:
    """Whether none of the files can have changed since without that its times say so."""
    return all(now_ns - max(one[1], one[2]) > SETTLED_NS for one in states)


def checked_files(bundle: Path) -> dict[str, Any]:
    """Name to ``[sha256, *state]`` of the files that had this checksum in this state."""
    try:
        known = json.loads((bundle / FOLDER / CHECKED).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def remember_checked(bundle: Path, files: Mapping[str, tuple[str, State]]) -> None:
    """Note files that had a checksum; those that changed a moment ago are left out."""
    now_ns = time.time_ns()
    known = {name: [digest, *one] for name, (digest, one) in files.items() if settled([one], now_ns)}
    if known and (unfinished := scratch(bundle)) is not None:
        try:
            unfinished.write_text(json.dumps(known, indent=1), "utf-8")
            os.replace(unfinished, bundle / FOLDER / CHECKED)
        except OSError:
            remove(unfinished)


def scratch(bundle: Path) -> Path | None:
    """An empty file to write to and rename; None where the folder cannot be written. What killed runs left goes."""
    folder = bundle / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with suppress(OSError):
            for path in folder.glob(f"{PARTIAL}*"):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    remove(path)
        descriptor, name = tempfile.mkstemp(prefix=PARTIAL, dir=folder)
        os.close(descriptor)
        path = Path(name)
        path.chmod(0o666 & ~umask())
    except OSError:
        return None
    return path


def remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
