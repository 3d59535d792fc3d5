"""Files of reports: found writable before a long measurement, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from pe_onnx.errors import ConfigError, ExportError, system_reason

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""GitHub's name of the file that is a job's summary page; what a step wrote to it before stays."""


def check_writable(path: Path, option: str) -> None:
    """Try the place of a report, and leave nothing there. Raises ConfigError, which names the option.

    What is no plain file, such as /dev/stdout, is taken as it is; folders that are missing will be made.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{option} {path} is a folder; name a file")
        if path.exists() and not path.is_file():
            return
        place = path.resolve()
        above = next(folder for folder in place.parents if folder.exists())
        trial = _beside(above / place.name)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {system_reason(error)}") from None


def write_report(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes beside their place and rename. Raises ExportError with the system's reason.

    The file that GITHUB_STEP_SUMMARY names keeps what it holds, and the content follows.
    """
    data = as_bytes(content)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        place = path.resolve()
        summary = os.environ.get(STEP_SUMMARY)
        if summary and place.is_file() and place == Path(summary).resolve():
            before = place.read_bytes()
            data = before + (b"\n" if before and not before.endswith(b"\n") else b"") + data
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(place)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {system_reason(error)}") from error


def as_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; half a surrogate pair, as of a path that is no UTF-8, as its escape."""
    return content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name[:200]}.partial-{os.getpid()}")
