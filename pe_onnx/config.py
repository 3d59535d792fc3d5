"""DecoderConfig: everything our own decoder is made from, its architecture and its encoding. Frozen, and closed.

A key that is not a field is an error that names it; nothing is dropped in silence. Field names are those of
transformers' ``config.json``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from pe_onnx.errors import ConfigError, did_you_mean


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_size, "a positive integer"),
    "Seed": (lambda value: value == 0 or _is_size(value), "an integer of at least 0"),
    "float": (_is_number, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a name"),
    "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "names and values"),
}
"""A field's declared type to what it accepts."""

Seed = int

CHOICES = {
    "norm": ("rms", "layer"),
    "mlp": ("gated", "plain"),
    "hidden_act": ("silu", "gelu", "gelu_tanh", "relu"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The usual decoders by configuration. Sizes are counts of channels, heads, layers or tokens."""

    encoding: str = "rope"
    encoding_parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    intermediate_size: int = 176
    max_position_embeddings: int = 2048
    """Tokens trained on; the length of a learned table."""
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "gated"
    hidden_act: str = "silu"
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-J, GPT-NeoX)."""
    tie_word_embeddings: bool = False
    """The head is the embedding. With random weights a tied decoder repeats its last token: it is nearest to itself."""
    embedding_scale: float = 1.0
    """The token embedding is multiplied by this before a positional vector is added."""
    score_scale: float | None = None
    """Factor on the scores; None: 1 / sqrt(head_dim); T5 has 1."""
    attention_softcap: float = 0.0
    """c: scores become c tanh(score / c); 0 for none."""
    logit_softcap: float = 0.0
    seed: Seed = 0
    """Of the random weights."""
    weights: str | None = None
    """Trained ones that come with pe-onnx, by the encoding they were trained with; None for random ones."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, _, optional = str(field.type).partition(" | ")
            if not (optional and value is None):
                accepts, text = KINDS[kind]
                _require(accepts(value), field.name, value, text)
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            _require(value in accepted, name, value, f"one of {', '.join(accepted)}")
        for name in ("norm_eps", "attention_softcap", "logit_softcap"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.head_dim is None:
            divisible = self.hidden_size % self.num_attention_heads == 0
            text = f"a divisor of hidden_size = {self.hidden_size}, or give head_dim"
            _require(divisible, "num_attention_heads", self.num_attention_heads, text)
        resolved = {
            "head_dim": self.hidden_size // self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
        }
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.score_scale is None:
            object.__setattr__(self, "score_scale", self.head_size**-0.5)
        text = f"a divisor of num_attention_heads = {self.num_attention_heads}"
        grouped = self.num_attention_heads % self.kv_heads == 0
        _require(grouped, "num_key_value_heads", self.num_key_value_heads, text)

    @property
    def head_size(self) -> int:
        """D, resolved."""
        return self.head_dim or 0

    @property
    def scale(self) -> float:
        """Factor on the scores, resolved."""
        assert self.score_scale is not None
        return self.score_scale

    @property
    def kv_heads(self) -> int:
        """K, resolved."""
        return self.num_key_value_heads or 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Raises ConfigError for a key that is not a field or a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown configuration key {key!r}{did_you_mean(key, known)}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DecoderConfig:
        """A named size with some fields replaced. Raises ConfigError for an unknown name or field."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)} (known: {', '.join(PRESETS)})")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, resolved; from_dict gives the same configuration back."""
        return {**dataclasses.asdict(self), "encoding_parameters": dict(self.encoding_parameters)}


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} must be {accepted}")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1408,
        "max_position_embeddings": 16384,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 16384,
    },
}
"""Byte-level decoders (vocabulary 256) in three sizes: 0.1M, 26M and 85M parameters."""
