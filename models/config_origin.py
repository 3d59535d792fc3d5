"""Where each resolved value of a configuration comes from, and which keys of config.json have no effect.

The configuration class is run again with one key of the file changed: what changes in the result comes from that key,
whatever its spelling. A key none of whose effects the model reads, see config_reads.py, is one that nothing reads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from pe_onnx.models import config_keys, rope_types
from pe_onnx.models.config_keys import LENGTHS, NO_REQUEST, OF_LAYERS, SWITCHED_OFF_BY, Path
from pe_onnx.models.config_reads import Reads

Flat = dict[Path, Any]
CLOSE = 0.85
"""Likeness at which an unknown key is taken for a misspelling of a known one."""


class Origins:
    """Of the leaves of ``raw``, a config.json, and of the text model's configuration that is made of it."""

    def __init__(
        self, config: PreTrainedConfig, raw: Mapping[str, Any], edit: Callable[[PreTrainedConfig], Any]
    ) -> None:
        """edit: changes the text model's configuration after it is made, for the command line."""
        self.config = text_config(config)
        self.known = _known(self.config)
        whole = type(config)
        key = next((key for key in config.sub_configs if getattr(config, key, None) is self.config), None)
        prefix = (key,) if key is not None and isinstance(raw.get(key), Mapping) else ()

        def resolve(values: Mapping[str, Any], edited: bool = True) -> Flat:
            text = text_config(whole.from_dict(copy.deepcopy(dict(values))))
            if edited:
                edit(text)
            return flat(text)

        self._resolve = lambda text: resolve(put(raw, prefix, text))
        self.raw: Mapping[str, Any] = raw[prefix[0]] if prefix else raw
        self.resolved = self._resolve(self.raw)
        stray = {key for key in self.raw if not self.is_known(key)}
        with contextlib.suppress(Exception):  # the class may set some of them itself
            self.known |= {path[0] for path in self._resolve({k: v for k, v in self.raw.items() if k not in stray})}
        plain = resolve(raw, edited=False)
        self.commanded = {path for path, value in self.resolved.items() if value != plain.get(path, self)}
        self.changed = {
            path: self._changes(self.raw, path, value) | self._same(path, value) for path, value in self.leaves()
        }
        self.given = set().union(*self.changed.values())

    def _same(self, path: Path, value: Any) -> set[Path]:
        own = (type(self.config).attribute_map.get(path[0], path[0]), *path[1:])
        return {own} if self.resolved.get(own, self) == value else set()

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Of config.json, those that bear on positions or attention, or look like a misspelling of such a key."""
        for path, value in config_keys.leaves(self.raw):
            if config_keys.bears(path) or self.misspelt(path[0]):
                yield path, value

    def is_known(self, key: str) -> bool:
        """Whether the configuration class has the key, or has taken it in while it was made."""
        return key in self.known or key not in self.config.__dict__

    def misspelt(self, key: str) -> str | None:
        """The known key that an unknown one resembles."""
        if self.is_known(key) or key.startswith("_"):
            return None
        names = [name for name in self.known if config_keys.bears((name,))]
        near = next(iter(difflib.get_close_matches(key, names, n=1, cutoff=CLOSE)), None)
        if near is None or self._changes(self.raw, (key,), self.raw[key]) - {(key,)}:  # it is read while it is made
            return None
        return near

    def without_effect(self, reads: Reads) -> Iterator[tuple[Path, Any, str]]:
        """Leaves of config.json that nothing reads, their values, and a remark on each."""
        remarks = rope_types.unread(self.config)
        for path, value in self.leaves():
            if not self._is_read(path, value, reads) and not self._is_harmless(path, value, reads):
                near = self.misspelt(path[0])
                remark = f"; did you mean {near!r}?" if near else ""
                yield path, value, remark or next((remarks[p] for p in self.changed[path] if p in remarks), "")

    def _is_read(self, path: Path, value: Any, reads: Reads) -> bool:
        changed = self.changed[path]
        if path[-1] in LENGTHS or any(reads.includes(self.config, p) for p in changed):
            return True
        own = (p[-1] for p in changed if p[0] == "rope_parameters" and p[-1] not in rope_types.KEYS)
        return any(reads.mentions(key) for key in own)  # a family's own, such as phimoe's long_mscale

    def _is_harmless(self, path: Path, value: Any, reads: Reads) -> bool:
        """Whether the same would result without the key, or is said elsewhere too."""
        if self.misspelt(path[0]) is not None:
            return False
        unknown_and_off = value is False and len(path) == 1 and path[0] not in self.known
        if value is None or value == {} or unknown_and_off:
            return True
        if any(self.resolved.get((switch,), True) in (False, None) for switch in SWITCHED_OFF_BY.get(path[-1], ())):
            return True
        if value in NO_REQUEST.get(path[-1], ()) or self._is_the_whole_length(path, value):
            return True
        return (
            self._repeats(path, value, reads)
            or self._is_default(path)
            or self._is_of_no_layer(path)
            or self._is_superseded(path, value, reads)
        )

    def _is_the_whole_length(self, path: Path, value: Any) -> bool:
        """Whether it is the length before a scaling that there is none of (Phi-4)."""
        kinds = [rope_types.TYPES[rope.get("rope_type", "default")] for _, rope in rope_types.blocks(self.config)]
        scaled = any(rope_types.ORIGINAL in kind.keys for kind in kinds)
        whole = self.resolved.get(("max_position_embeddings",))
        return path[-1] == rope_types.ORIGINAL and not scaled and value == whole

    def _repeats(self, path: Path, value: Any, reads: Reads) -> bool:
        if not self.is_known(path[0]):  # ``sliding_window_size`` beside ``sliding_window``
            return any(
                (path[0].startswith(f"{p[-1]}_") or path[0].endswith(f"_{p[-1]}"))
                and v == value
                and type(v) is type(value)
                and reads.includes(self.config, p)
                for p, v in self.resolved.items()
            )
        name = {"type": "rope_type"}.get(path[-1], path[-1])
        return any(p[-1] == name and v == value and reads.includes(self.config, p) for p, v in self.resolved.items())

    def _is_default(self, path: Path) -> bool:
        own = set() if self.is_known(path[0]) else {path}  # a copy that is kept and means nothing
        if not self.changed[path] - own:  # it has no effect to compare
            return False
        try:
            without = self._resolve(put(self.raw, path))
        except Exception:  # it cannot be left out
            return False
        leaves = (without.keys() | self.resolved.keys()) - own
        return all(without.get(leaf, self) == self.resolved.get(leaf, self) for leaf in leaves)

    def _is_superseded(self, path: Path, value: Any, reads: Reads) -> bool:
        """Whether another key says the same as ``path``, from which transformers would make that key's values."""
        for key in self.raw:
            if key != path[0] and config_keys.bears((key,)):
                rest = {k: v for k, v in self.raw.items() if k != key}
                try:
                    made = self._resolve(rest)
                    effects = {p for p in self._changes(rest, path, value) if p[0] == key}
                    effects = {p for p in effects if reads.includes(self.config, p)}
                except Exception:
                    continue
                if effects:
                    return all(made.get(p, self) == self.resolved.get(p, self) for p in effects)
        return False

    def _is_of_no_layer(self, path: Path) -> bool:
        """Whether it is about a type of layers that this model has none of."""
        types = self.resolved.get(("layer_types",)) or ()

        def of_none(leaf: Path) -> bool:
            word = OF_LAYERS.get(leaf[-1])
            if word is not None:
                return bool(types) and not any(word in name for name in types)
            return len(leaf) > 2 and leaf[1] in ALLOWED_LAYER_TYPES and leaf[1] not in types

        return all(of_none(leaf) for leaf in (self.changed[path] - {path} or {path}))

    def _changes(self, raw: Mapping[str, Any], path: Path, value: Any) -> set[Path]:
        """Resolved leaves that are others when ``path`` has another value."""
        before = self.resolved if raw is self.raw else self._resolve(raw)
        effects: set[Path] = set()
        made = False
        for other in others(value):
            with contextlib.suppress(Exception):  # what would be refused is read, and tells no more
                after = self._resolve(put(raw, path, other))
                effects |= {p for p in before.keys() | after.keys() if before.get(p, self) != after.get(p, self)}
                made = True
        return effects if made else {p for p in before if p[-1] == path[-1]}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's configuration; of an encoder-decoder the whole one, in which both halves have their keys."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def others(value: Any) -> list[Any]:
    """Values of the same kind that are not ``value``, the likeliest to be accepted first."""
    made: dict[type, Callable[[Any], list[Any]]] = {
        bool: lambda v: [not v],
        int: lambda v: [v * 2, v + 1, v - 1, 1],
        float: lambda v: [v * 2, v / 2, v + 1],
        str: lambda v: [v + "x"],
        list: lambda v: [_renamed(v), [others(item)[0] if others(item) else item for item in v], v[::-1], v[:-1]],
    }
    return [other for other in made.get(type(value), lambda v: [])(value) if other != value]


def _renamed(value: Any) -> Any:
    """A list with every name in it changed."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    return f"{value}x" if isinstance(value, str) else value


def blame(config_class: type[PreTrainedConfig], raw: Mapping[str, Any]) -> list[str]:
    """Keys without which a configuration could be made that cannot be made with them."""
    found = []
    for path, value in config_keys.leaves(raw):
        with contextlib.suppress(Exception):
            config_class.from_dict(copy.deepcopy(put(raw, path)))
            found.append(f"{'.'.join(path)} = {config_keys.shown(value)}")
    return found


def flat(config: PreTrainedConfig) -> Flat:
    """Every leaf of a configuration."""
    return dict(config_keys.leaves(config.to_dict()))


def _known(config: PreTrainedConfig) -> set[str]:
    fields = {field.name for field in dataclasses.fields(config)}
    return fields | set(type(config).attribute_map) | {"rope_scaling", "per_layer_config"}


def put(values: Mapping[str, Any], path: Path, value: Any = dataclasses.MISSING) -> dict[str, Any]:
    """A copy with another value at ``path``, or without it. An empty path is the whole."""
    if not path:
        return dict(value)
    result = dict(values)
    if len(path) > 1:
        result[path[0]] = put(values[path[0]], path[1:], value)
    elif value is dataclasses.MISSING:
        del result[path[0]]
    else:
        result[path[0]] = value
    return result
