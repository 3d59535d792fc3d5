"""PositionalEncoding: the one interface behind which the decoder knows no encoding by name.

An encoding overrides one of three hooks, or none: ``embed`` adds a vector to the token embedding, ``tables`` and
``rotate`` turn queries and keys by position, ``bias`` adds a term to the scores. A mix overrides ``layer`` in their
place: it names the encoding of each layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from pe_onnx import discovery
from pe_onnx.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pe_onnx.config import DecoderConfig

Hook = Literal["none", "embed", "rotate", "bias", "layer"]
Tables = tuple[torch.Tensor, ...]


class PositionalEncoding(nn.Module):
    """Base of all encodings. A subclass takes the decoder's config and its own parameters as keywords."""

    hook: ClassVar[Hook] = "none"
    """Which of them a subclass overrides, found when it is defined."""
    path_dependent: bool = False
    """Whether a cached key depends on how far its step reached, so that other chunks of a text give other logits."""
    reads_trained_length: ClassVar[bool] = False
    """Whether ``max_position_embeddings`` is the trained length also beside a ``factor``; for others it is the longer
    one that the factor makes of it, as transformers has it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks: tuple[Hook, ...] = ("embed", "rotate", "bias", "layer")
        changed = [hook for hook in hooks if getattr(cls, hook) is not getattr(PositionalEncoding, hook)]
        if len(changed) > 1:
            raise TypeError(f"{cls.__name__} overrides {' and '.join(changed)}; an encoding has one hook")
        cls.hook = changed[0] if changed else "none"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.parameters_used: dict[str, Any] = {}

    @property
    def max_length(self) -> int | None:
        """The greatest number of tokens it can encode; None where nothing limits it."""
        return None

    def max_length_in(self, dtype: str) -> int | None:
        """The same for an export in ``fp32``, ``fp16`` or ``bf16``, where the cache's range matters."""
        return self.max_length

    def layer(self, index: int) -> PositionalEncoding:
        """The encoding of a layer. Layers that are given the same object share its tables or bias of a step."""
        return self

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 ``[B, T]`` to the vectors ``[B, T, C]`` that are added to the token embedding."""
        raise NotImplementedError

    def tables(self, positions: torch.Tensor) -> Tables:
        """int64 ``[B, T]`` to what ``rotate`` needs (float32 cosines and sines ``[B, T, R/2]``), once per step."""
        raise NotImplementedError

    def rotate(self, query: torch.Tensor, key: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed queries ``[B, T, H*D]`` and keys ``[B, T, K*D]``, rotated. The keys are cached as they leave here."""
        raise NotImplementedError

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        """The term ``[B, H, T, S]`` on the scores, once per step. key_positions None: 0 .. key_length - 1 in a row."""
        raise NotImplementedError

    def draw_weights(self, generator: torch.Generator) -> None:
        """Random weights of such a size that positions matter: unit normals unless a subclass knows better."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


class PerLayer(PositionalEncoding):
    """Base of mixes: an encoding for each layer, in order. Layers share what an object computes if it stands twice."""

    def __init__(self, config: DecoderConfig, layers: Iterable[PositionalEncoding]) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(layers)
        self.path_dependent = any(self.layer(i).path_dependent for i in range(len(self.layers)))

    def layer(self, index: int) -> PositionalEncoding:
        chosen = self.layers[index]
        assert isinstance(chosen, PositionalEncoding)
        return chosen

    def draw_weights(self, generator: torch.Generator) -> None:
        for encoding in dict.fromkeys(self.layer(i) for i in range(len(self.layers))):
            encoding.draw_weights(generator)


def build_encoding(config: DecoderConfig) -> PositionalEncoding:
    """The encoding that a config names, with its parameters. Raises ConfigError for what is unknown."""
    cls = encoding_class(config.encoding)
    values = all_parameters(cls, config.encoding, config.encoding_parameters)
    encoding = cls(config, **values)
    encoding.parameters_used = values
    return encoding


def encoding_class(name: str) -> type[PositionalEncoding]:
    """Of a registered name. Raises ConfigError for an unknown one."""
    module = discovery.load("encodings", name)
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    classes = [x for x in own if issubclass(x, PositionalEncoding)]
    if len(classes) != 1:
        raise ConfigError(f"encoding {name!r}: its file holds {len(classes)} PositionalEncoding classes, not one")
    return classes[0]


def all_parameters(cls: type[PositionalEncoding], encoding: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those given, in their types, and the defaults of the others. Raises ConfigError for what is unknown."""
    accepted = declared_parameters(cls)
    for name in given:
        if name not in accepted:
            takes = f"takes {', '.join(accepted)}" if accepted else "takes no parameters"
            hint = did_you_mean(name, accepted)
            raise ConfigError(f"encoding {encoding!r}: unknown parameter {name!r}{hint} ({takes})")
    return {**accepted, **_converted(encoding, accepted, given)}


def declared_parameters(cls: type[PositionalEncoding]) -> dict[str, Any]:
    """Name and default of each parameter, read off the constructor's keyword-only arguments.

    A constructor that takes ``**keywords`` passes them on: its base's parameters are its own too.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        keywords = inspect.signature(vars(base)["__init__"]).parameters.values()
        for p in keywords:
            if p.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(p.name, p.default)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in keywords):
            break
    return found


def _to_bool(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _to_int(value: Any) -> int:
    number = int(float(value))
    if isinstance(value, bool) or number != float(value):
        raise ValueError
    return number


def _to_float(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _to_float_or_none(value: Any) -> float | None:
    return None if value is None or str(value).lower() == "none" else _to_float(value)


def _to_floats(value: Any) -> tuple[float, ...]:
    items = [x for x in value.split(";") if x.strip()] if isinstance(value, str) else list(value)
    return tuple(_to_float(item) for item in items)


CONVERSIONS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_to_bool, "true or false"),
    int: (_to_int, "an integer"),
    float: (_to_float, "a finite number"),
    type(None): (_to_float_or_none, "a finite number or none"),
    tuple: (_to_floats, "finite numbers, as 1;1.2;2"),
}
"""The type of a parameter's default to how it is read, and what is accepted."""


def _converted(encoding: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the command line or JSON has them, in the type of their defaults."""
    result = {}
    for name, value in given.items():
        kind = type(defaults[name])
        if kind not in CONVERSIONS:
            raise ConfigError(
                f"encoding {encoding!r}: the default of {name} must be a bool, an int, a float, None or a tuple"
            )
        convert, accepted = CONVERSIONS[kind]
        try:
            result[name] = convert(value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ConfigError(f"encoding {encoding!r}: {name} = {value!r} must be {accepted}") from None
    return result


def check(encoding: str, condition: bool, name: str, value: object, accepted: str) -> None:
    """Raises ConfigError for a parameter that is out of range."""
    if not condition:
        raise ConfigError(f"{encoding}: {name} = {value} must be {accepted}")
