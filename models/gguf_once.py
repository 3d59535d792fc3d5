"""A GGUF file parsed once, where transformers parses it anew for the configuration, the weights and the tokenizer.

Each time its reader goes through every token of the vocabulary in Python, which for a small model takes longer than
reading its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedConfig


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within, transformers gets the same reader of a file, and the same map of a model's names, each time."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """What transformers reads of a file's metadata as its configuration."""
    state = (folder / name).stat()
    return copy.deepcopy(_config_of(folder, name, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=1)
def _config_of(folder: Path, name: str, size: int, changed: int) -> dict[str, Any]:
    return dict(PreTrainedConfig.get_config_dict(folder, gguf_file=name)[0])
