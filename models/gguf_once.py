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
import numpy as np
from transformers import PreTrainedConfig, modeling_gguf_pytorch_utils

STRING = 8
"""GGUF's number of the type."""

_parse_value = modeling_gguf_pytorch_utils._gguf_parse_value

Array = np.ndarray[Any, Any]


class Reader(gguf.GGUFReader):
    """gguf 0.19's reader, its pieces cut from a plain array: of a memory map numpy makes each in Python."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Array:
        kind = np.dtype(dtype)
        if "plain" not in self.__dict__:
            self.plain: Array = self.data.view(np.ndarray)
        piece = self.plain[offset : offset + kind.itemsize * int(count)].view(kind)
        return piece.view(kind.newbyteorder(self.byte_order if override_order is None else override_order))


def parse_value(value: Array, types: Any) -> Any:
    """transformers' ``_gguf_parse_value`` of one piece, strings without a list of their bytes."""
    last = types[-1] if isinstance(types, list) else types
    return bytes(value).decode() if last == STRING else _parse_value(value, types)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within, transformers gets the same reader of a file, and the same map of a model's names, each time."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(names)
    modeling_gguf_pytorch_utils._gguf_parse_value = parse_value
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
        modeling_gguf_pytorch_utils._gguf_parse_value = _parse_value


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """What transformers reads of a file's metadata as its configuration."""
    state = (folder / name).stat()
    return copy.deepcopy(_config_of(folder, name, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=1)
def _config_of(folder: Path, name: str, size: int, changed: int) -> dict[str, Any]:
    return dict(PreTrainedConfig.get_config_dict(folder, gguf_file=name)[0])
