"""Weights that come with the package: small decoders over bytes, one for each of the usual encodings.

``models/train.py`` made them, on the King James Version of the Bible, all in the same way; ``pe_onnx/trained`` holds
them in float16, with the log of each run and the text that was held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_onnx.errors import CheckpointError, ConfigError, did_you_mean, needs
from pe_onnx.report_files import write_report

FOLDER = Path(__file__).with_name("trained")
HELD_OUT = FOLDER / "heldout.txt"


def names() -> list[str]:
    """Encodings that have weights, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def log(name: str) -> dict[str, Any]:
    """Of the training run. Raises ConfigError for an unknown name, CheckpointError for a file that is broken."""
    if name not in names():
        known = names()
        raise ConfigError(
            f"no weights {name!r} come with pe-onnx{did_you_mean(name, known)} (known: {', '.join(known)})"
        )
    try:
        found = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the log of the weights {name!r} cannot be read: {error}") from None
    assert isinstance(found, dict)
    return found


def config(name: str) -> dict[str, Any]:
    """Fields of DecoderConfig. Raises what ``log`` raises."""
    fields = log(name)["config"]
    assert isinstance(fields, dict)
    return fields


def read(name: str) -> dict[str, Any]:
    """The decoder's state, float32 tensors of PyTorch by name. Raises CheckpointError where they cannot be read."""
    with needs("trained weights", "'pe-onnx[export]'"):
        from safetensors.torch import load_file

    path = FOLDER / f"{name}.safetensors"
    try:
        return {key: tensor.float() for key, tensor in load_file(path).items()}
    except Exception as error:
        raise CheckpointError(f"the weights {path.name} cannot be read: {error}") from None


def digest(name: str) -> str:
    """SHA-256 of the weights' file, for the manifest of what is made with them."""
    return hashlib.sha256((FOLDER / f"{name}.safetensors").read_bytes()).hexdigest()


def check_unchanged(source: Mapping[str, Any]) -> None:
    """source: a manifest's. Raises CheckpointError where a bundle was made with other weights than are here now."""
    name = source["config"].get("weights")
    if name is not None and source.get("weights_sha256") != (digest(name) if name in names() else None):
        raise CheckpointError(f"this pe-onnx has other weights {name!r} than the bundle was made with; export it again")


def held_out() -> bytes:
    """Text that none of them was trained on."""
    return HELD_OUT.read_bytes()


def write(folder: Path, name: str, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """A run's weights, in float16, and its log."""
    from safetensors.torch import save

    tensors = {key: tensor.half().contiguous() for key, tensor in state.items()}
    write_report(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_report(folder / f"{name}.safetensors", save(tensors, {"format": "pt"}))
