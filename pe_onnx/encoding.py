"""PositionalEncoding: the one interface behind which the decoder knows no encoding by name.

An encoding overrides one of three hooks, or none: ``embed`` adds a vector to the token embedding, ``tables`` and
``rotate`` turn queries and keys by position, ``bias`` adds a term to the scores.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from pe_onnx import discovery
from pe_onnx.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pe_onnx.config import DecoderConfig

Hook = Literal["none", "embed", "rotate", "bias"]
Tables = tuple[torch.Tensor, torch.Tensor]


class PositionalEncoding(nn.Module):
    """Base of all encodings. A subclass takes the decoder's config and its own parameters as keywords."""

    hook: ClassVar[Hook] = "none"
    """Which of the three a subclass overrides, found when it is defined."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks: tuple[Hook, ...] = ("embed", "rotate", "bias")
        changed = [hook for hook in hooks if getattr(cls, hook) is not getattr(PositionalEncoding, hook)]
        if len(changed) > 1:
            raise TypeError(f"{cls.__name__} overrides {' and '.join(changed)}; an encoding has one hook")
        cls.hook = changed[0] if changed else "none"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.parameters_used: dict[str, Any] = {}

    @property
    def max_length(self) -> int | None:
        """The greatest number of tokens it can encode; None where nothing limits it."""
        return None

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 ``[B, T]`` to the vectors ``[B, T, C]`` that are added to the token embedding."""
        raise NotImplementedError

    def tables(self, positions: torch.Tensor) -> Tables:
        """int64 ``[B, T]`` to float32 cosines and sines ``[B, T, R/2]``, computed once per step."""
        raise NotImplementedError

    def rotate(self, x: torch.Tensor, tables: Tables, num_heads: int) -> torch.Tensor:
        """Packed queries or keys ``[B, T, num_heads*D]``, rotated."""
        raise NotImplementedError

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        """The term ``[B, H, T, S]`` on the scores. key_positions None: 0 .. key_length - 1 in every row."""
        raise NotImplementedError


def build_encoding(config: DecoderConfig) -> PositionalEncoding:
    """The encoding that a config names, with its parameters. Raises ConfigError for what is unknown."""
    module = discovery.load("encodings", config.encoding)
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    classes = [x for x in own if issubclass(x, PositionalEncoding)]
    if len(classes) != 1:
        raise ConfigError(
            f"encoding {config.encoding!r}: its file holds {len(classes)} PositionalEncoding classes, not one"
        )
    cls = classes[0]
    accepted = declared_parameters(cls)
    for name in config.encoding_parameters:
        if name not in accepted:
            takes = f"takes {', '.join(accepted)}" if accepted else "takes no parameters"
            hint = did_you_mean(name, accepted)
            raise ConfigError(f"encoding {config.encoding!r}: unknown parameter {name!r}{hint} ({takes})")
    values = {**accepted, **_converted(config.encoding, accepted, config.encoding_parameters)}
    encoding = cls(config, **values)
    encoding.parameters_used = values
    return encoding


def declared_parameters(cls: type[PositionalEncoding]) -> dict[str, Any]:
    """Name and default of each parameter, read off the constructor's keyword-only arguments."""
    keywords = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}


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


CONVERSIONS: dict[type, Callable[[Any], Any]] = {bool: _to_bool, int: _to_int, float: _to_float}
KINDS = {bool: "true or false", int: "an integer", float: "a finite number"}


def _converted(encoding: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the command line or JSON has them, in the type of their defaults."""
    result = {}
    for name, value in given.items():
        kind = type(defaults[name])
        if kind not in CONVERSIONS:
            raise ConfigError(f"encoding {encoding!r}: the default of {name} must be a bool, an int or a float")
        try:
            result[name] = CONVERSIONS[kind](value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ConfigError(f"encoding {encoding!r}: {name} = {value!r} must be {KINDS[kind]}") from None
    return result
