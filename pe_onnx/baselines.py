"""The file of baselines: by bundle and provider, what ``regression.measure`` gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pe_onnx.errors import ConfigError
from pe_onnx.relative import Relative
from pe_onnx.report_files import write_report

FORMAT = 1
KIND = "pe-onnx latency baselines"


class OtherFormatError(ConfigError):
    """A file of baselines in a format that this pe-onnx does not read; it can be made again."""

    def __init__(self, path: str | Path, format: Any) -> None:
        super().__init__(
            f"baseline {path} has format {format!r}, this pe-onnx reads {FORMAT}: make it again with --update-baseline"
        )
        self.format = format


def read_baselines(path: str | Path) -> dict[str, Relative]:
    """Key, such as ``bundle@cpu`` (``BundleCheck.key``), to baseline.

    Raises ConfigError for a file that is missing or holds none, and OtherFormatError for one of another format.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"baseline {path} cannot be read: {error.strerror}; make one with --update-baseline"
        ) from None
    except ValueError as error:
        raise ConfigError(f"baseline {path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ConfigError(f"baseline {path} holds no {KIND}")
    if values.get("format") != FORMAT:
        raise OtherFormatError(path, values.get("format"))
    found = {}
    entries = values.get("bundles")
    if not isinstance(entries, dict):
        raise ConfigError(f"baseline {path} is damaged: it has no bundles by name")
    for key, entry in entries.items():
        try:
            found[key] = Relative.from_dict(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"baseline {path}: the entry {key!r} is damaged ({error})") from None
    return found


def write_baselines(path: str | Path, baselines: dict[str, Relative]) -> None:
    """Written whole or not at all, folders that are missing made. Raises ExportError where it cannot."""
    values = {"kind": KIND, "format": FORMAT, "bundles": {key: one.to_dict() for key, one in sorted(baselines.items())}}
    write_report(Path(path), json.dumps(values, indent=2) + "\n")
