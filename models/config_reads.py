"""Which keys of a configuration a model reads, watched while transformers builds and runs it.

Counted are reads by the model's own code and by the functions it shares with others (masks, rotary frequencies); not
counted are those of the configuration classes, which copy and check every key.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedConfig

from pe_onnx.models.config_keys import Path

COUNTED = ("transformers.models.", "transformers.masking_utils", "transformers.modeling_rope_utils")
NOT_COUNTED = (".configuration_", "RotaryEmbeddingConfigMixin.")


class Reads:
    """What was read: attributes by the configuration's class, entries of dictionaries by their path."""

    def __init__(self) -> None:
        self.attributes: set[tuple[type, str]] = set()
        self.entries: set[Path] = set()
        self.modules: set[str] = set()
        """Whose code read something."""

    def mentions(self, key: str) -> bool:
        """Whether the source of a module that reads looks an entry of this name up, if not on what was run."""
        return any(f'["{key}"]' in inspect.getsource(sys.modules[name]) for name in self.modules)

    def includes(self, config: PreTrainedConfig, path: Path) -> bool:
        """Whether the leaf at ``path`` of ``config`` was read."""
        value: Any = config
        for i, key in enumerate(path):
            if isinstance(value, PreTrainedConfig):
                if i and path[0] == "per_layer_config":
                    return (type(value), path[-1]) in self.attributes
                read = (type(value), key) in self.attributes
                value = value.__dict__.get(key)
            elif isinstance(value, WatchedDict):
                read = path[: i + 1] in self.entries
                value = dict.get(value, key)
            else:  # a plain dictionary or list, read whole
                break
            if not read:
                return path[0] == "per_layer_config" and (type(config), path[-1]) in self.attributes
        return True


class WatchedDict(dict[str, Any]):
    """Notes which of its entries the model's code reads; copies of it note the same."""

    def __init__(self, values: Mapping[str, Any], path: Path, reads: Reads) -> None:
        super().__init__(values)
        self._path, self._reads = path, reads

    def _note(self, *keys: str) -> None:
        frame = sys._getframe(2)
        if _counts(frame):
            self._reads.entries.update((*self._path, key) for key in keys)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().setdefault(key, default)

    def items(self) -> Any:
        self._note(*self)
        return super().items()

    def values(self) -> Any:
        self._note(*self)
        return super().values()

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # its being here makes ``{**self}`` go through __getitem__

    def copy(self) -> WatchedDict:
        return WatchedDict(self, self._path, self._reads)

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedDict:
        return WatchedDict({k: copy.deepcopy(v, memo) for k, v in dict.items(self)}, self._path, self._reads)


def watch(config: PreTrainedConfig, reads: Reads) -> None:
    """Put watched dictionaries in place of those that ``config`` holds."""
    for key, value in config.__dict__.items():
        if type(value) is dict and not key.startswith("_") and key != "per_layer_config":
            config.__dict__[key] = _watched(value, (key,), reads)


def _watched(values: dict[Any, Any], path: Path, reads: Reads) -> Any:
    if not all(isinstance(key, str) for key in values):
        return values
    inner = {k: _watched(v, (*path, k), reads) if type(v) is dict else v for k, v in values.items()}
    return WatchedDict(inner, path, reads)


def unwatch(config: PreTrainedConfig) -> None:
    """Plain dictionaries again."""
    for key, value in config.__dict__.items():
        if isinstance(value, WatchedDict):
            config.__dict__[key] = _plain(value)


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in dict.items(value)} if isinstance(value, dict) else value


def _counts(frame: FrameType | None) -> bool:
    return _reader(frame) is not None


def _reader(frame: FrameType | None) -> str | None:
    """The module of the model's code that reads, directly or through a property of the configuration."""
    while frame is not None and (_is_lookup(frame) or _is_property(frame)):
        frame = frame.f_back
    if frame is None:
        return None
    module = frame.f_globals.get("__name__", "")
    name = f"{module}:{frame.f_code.co_qualname}"
    return module if name.startswith(COUNTED) and not any(part in name for part in NOT_COUNTED) else None


def _is_lookup(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == __name__ or frame.f_code.co_name == "__getattribute__"


def _is_property(frame: FrameType) -> bool:
    owner = frame.f_locals.get("self")
    own = getattr(type(owner), frame.f_code.co_name, None)
    return isinstance(owner, PreTrainedConfig) and isinstance(own, property | functools.cached_property)


@contextmanager
def recorded() -> Iterator[Reads]:
    """Watches the attributes of every configuration. Not for several threads at once."""
    reads = Reads()
    original = PreTrainedConfig.__getattribute__

    def read(self: PreTrainedConfig, key: str) -> Any:
        value = original(self, key)
        reader = None if key.startswith("_") else _reader(sys._getframe(1))
        if reader is not None:
            reads.attributes.add((type(self), type(self).attribute_map.get(key, key)))
            reads.modules.add(reader)
        return value

    PreTrainedConfig.__getattribute__ = read
    try:
        yield reads
    finally:
        PreTrainedConfig.__getattribute__ = original
