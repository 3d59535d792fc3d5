"""The file of baselines: by bundle and provider, what ``regression.measure`` gave."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pe_onnx.errors import ConfigError
from pe_onnx.relative import Relative

FORMAT = 1
KIND = "pe-onnx latency baselines"


def baseline_key(folder: str | Path, provider: str) -> str:
    """``bundle@cpu``: the name under which a bundle's baseline stands."""
    return f"{Path(folder).resolve().name}@{provider}"


def read_baselines(path: str | Path) -> dict[str, Relative]:
    """Key to baseline. Raises ConfigError for a file that is missing, no baselines, or of another format."""
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
        raise ConfigError(
            f"baseline {path} has format {values.get('format')!r}, this pe-onnx reads {FORMAT}: make it again with "
            f"--update-baseline"
        )
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
    """Beside its place and renamed: a killed run leaves the old file or none. Raises ConfigError where it cannot."""
    path = Path(path)
    values = {"kind": KIND, "format": FORMAT, "bundles": {key: one.to_dict() for key, one in sorted(baselines.items())}}
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"baseline {path} cannot be written: {error.strerror}") from None
    finally:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)
