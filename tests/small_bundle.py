"""A small bundle whose files all hold one text, to tell an old one from a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_onnx.bundle import FORMAT, read_bundle, write_bundle


def manifest() -> dict[str, Any]:
    """All that a bundle must say, of a model that is not there."""
    return {
        "format": FORMAT,
        "contract": 1,
        "target": "ort",
        "dtype": "fp32",
        "logits": "last",
        "encoding": {"name": "rope", "parameters": {}, "path_dependent": False},
        "model": {
            "caches": [[4, 16], [4, 16]],
            "vocab_size": 256,
            "trained_length": 2048,
            "max_length": None,
            "encoder": None,
        },
        "tokenizer": {"kind": "bytes"},
        "source": {"kind": "module", "class": "M"},
        "graph": {"opsets": {"": 23}, "operators": {}, "functions": [], "weight_bytes": 0},
        "tools": {},
        "proof": {"verified": False},
    }


def write(folder: Path, text: str, force: bool = False) -> None:
    """A small bundle whose files all hold ``text``."""
    with write_bundle(folder, manifest(), force) as partial:
        (partial / "model.onnx").write_text(text)
        (partial / "model.onnx.data").write_text(text * 1000)
        (partial / "onnx").mkdir()
        (partial / "onnx" / "tokenizer.json").write_text(text)


def held(folder: Path) -> str:
    """The text of a bundle, checked to be whole."""
    read_bundle(folder)
    text = (folder / "model.onnx").read_text()
    assert (folder / "model.onnx.data").read_text() == text * 1000
    assert (folder / "onnx" / "tokenizer.json").read_text() == text
    return text


def no_exchange(a: Path, b: Path) -> bool:
    """A system that cannot swap two folders: macOS, NFS, and others."""
    return False
