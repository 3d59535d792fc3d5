"""A bundle's files laid out for another runtime, server or library: hard links where they can be, else copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import ConfigError
from pe_onnx.machine import versions
from pe_onnx.packages import Options, Package, described, load_kind
from pe_onnx.placing import check_place, copy_file, link_or_copy, placed

RECORD = "pe_onnx_package.json"
"""What a package was made of; by it --force knows one."""
FORMAT = 1


def package(
    bundles: str | Path | Bundle | Sequence[str | Path | Bundle],
    consumer: str,
    output: str | Path,
    options: Options | None = None,
    copy: bool = False,
    force: bool = False,
) -> Package:
    """Write the folder ``output`` for a consumer, a name of ``pe_onnx/packages/``, and return what was made.

    bundles: one, or for ``transformersjs`` one for each kind of weights. copy: no hard links. force: replace a package.
    Raises ConfigError for what the consumer cannot run exactly, BundleError for a broken bundle and ExportError for
    what cannot be written; then nothing is written.
    """
    output = Path(output)
    if isinstance(bundles, str | Path | Bundle):
        bundles = [bundles]
    if not bundles:
        raise ConfigError("no bundle was given")
    options = options or Options()
    kind = load_kind(consumer, options, len(bundles))
    check_place(output, force, "package", holds_package)
    read = [bundle if isinstance(bundle, Bundle) else read_bundle(bundle) for bundle in bundles]
    made = kind(read, options, copy_file if copy else link_or_copy)
    made.check()
    with placed(output) as folder:
        made.write(folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        record = {
            "format": FORMAT,
            "for": consumer,
            "files": files,
            "notes": made.notes,
            "bundles": [described(bundle) for bundle in read],
            "tools": versions(()),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return made


def holds_package(folder: Path) -> bool:
    """Whether a folder has a record of ours."""
    try:
        record: Any = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"format", "for"} <= record.keys()
