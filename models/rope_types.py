"""RoPE scalings of transformers 5.23 (``modeling_rope_utils``) as a table: the keys each type reads and their values.

transformers logs a warning for a key too many and a value out of range; here the value is refused by name, and a key
that the type does not read is reported to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from pe_onnx.errors import CheckpointError, did_you_mean
from pe_onnx.models import config_keys as kinds
from pe_onnx.models.config_keys import Kind, Path

KEYS: dict[str, Kind] = {
    "rope_type": kinds.NAME,
    "type": kinds.NAME,
    "rope_theta": kinds.ABOVE_ONE,
    "partial_rotary_factor": kinds.SHARE,
    "factor": kinds.FROM_ONE_OR_NULL,
    "original_max_position_embeddings": kinds.COUNT,
    "attention_factor": kinds.POSITIVE_OR_NULL,
    "beta_fast": kinds.POSITIVE_OR_NULL,
    "beta_slow": kinds.POSITIVE_OR_NULL,
    "mscale": kinds.FROM_ZERO_OR_NULL,
    "mscale_all_dim": kinds.FROM_ZERO_OR_NULL,
    "truncate": kinds.FLAG,
    "low_freq_factor": kinds.POSITIVE,
    "high_freq_factor": kinds.POSITIVE,
    "short_factor": kinds.FACTORS,
    "long_factor": kinds.FACTORS,
    "mrope_section": kinds.SECTIONS,
}
"""Every key of rope parameters and its values, whatever the type."""

Relation = Callable[[PreTrainedConfig, Mapping[str, Any]], str | None]
"""What is wrong between several keys, or None."""


def rotary_size(config: PreTrainedConfig, rope: Mapping[str, Any]) -> int:
    """R, channels of a head that rotate."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * rope.get("partial_rotary_factor", 1.0))


def _ramp(config: PreTrainedConfig, rope: Mapping[str, Any]) -> str | None:
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    return None if fast > slow else f"beta_fast = {fast} must be greater than beta_slow = {slow}"


def _band(config: PreTrainedConfig, rope: Mapping[str, Any]) -> str | None:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return None if low < high else f"low_freq_factor = {low} must be less than high_freq_factor = {high}"


def _factor(config: PreTrainedConfig, rope: Mapping[str, Any]) -> str | None:
    return None if rope.get("factor") is not None else "factor = null must be a number from 1"


def _lists(config: PreTrainedConfig, rope: Mapping[str, Any]) -> str | None:
    half = rotary_size(config, rope) // 2
    wrong = next((key for key in ("short_factor", "long_factor") if len(rope[key]) != half), None)
    if wrong is None:
        return None
    return f"{wrong} has {len(rope[wrong])} numbers and must have {half}, half the channels of head_dim that rotate"


@dataclass(frozen=True)
class RopeType:
    """What transformers reads for one ``rope_type``."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers takes for an optional key that is not there."""
    relations: tuple[Relation, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({"rope_type", "rope_theta", "partial_rotary_factor", *self.required, *self.optional})


ORIGINAL = "original_max_position_embeddings"
TYPES: dict[str, RopeType] = {
    "default": RopeType(),
    "axial": RopeType(),
    "linear": RopeType(("factor",), relations=(_factor,)),
    "dynamic": RopeType(("factor",), relations=(_factor,)),
    "yarn": RopeType(
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        {"beta_fast": 32, "beta_slow": 1, "truncate": True},
        (_ramp,),
    ),
    "longrope": RopeType(
        ("short_factor", "long_factor", ORIGINAL),
        ("attention_factor", "factor"),
        relations=(_lists,),
    ),
    "llama3": RopeType(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), relations=(_factor, _band)),
    "proportional": RopeType((), ("factor",)),
}


def check_raw(raw: Mapping[str, Any], where: str) -> None:
    """Refuse values out of range in config.json's own spelling. Raises CheckpointError."""
    for name in ("rope_parameters", "rope_scaling"):
        for path, value in kinds.leaves(raw.get(name) or {}, (name,)):
            kind = KEYS.get(path[-1])
            if kind is not None:
                kind.check(path, value, where)


def check(config: PreTrainedConfig, where: str) -> None:
    """Refuse resolved rope parameters that are of no known type, lack a key or contradict each other.

    Raises CheckpointError.
    """
    for path, rope in blocks(config):
        kind = rope.get("rope_type", "default")
        if kind not in TYPES:
            hint = did_you_mean(str(kind), TYPES)
            raise CheckpointError(
                f"{where}: {'.'.join(path)}: rope_type = {kinds.shown(kind)} is not known to transformers{hint} "
                f"(known: {', '.join(TYPES)})"
            )
        known = TYPES[kind]
        for key in known.required:
            if key not in rope:
                raise CheckpointError(
                    f"{where}: {'.'.join(path)}: rope_type {kind!r} needs {key!r}{_instead(rope, key)}"
                )
        for key in known.keys & rope.keys():
            KEYS[key].check((*path, key), rope[key], where)
        for relation in known.relations:
            problem = relation(config, rope)
            if problem:
                raise CheckpointError(f"{where}: {'.'.join(path)}: {problem}")


def unread(config: PreTrainedConfig) -> dict[Path, str]:
    """Keys that their rope type does not read, with the nearest that it does."""
    extra = set(getattr(config, "ignore_keys_at_rope_validation", None) or ())
    found = {}
    for path, rope in blocks(config):
        known = TYPES[rope.get("rope_type", "default")].keys
        for key, value in rope.items():
            if key not in known | extra | {"type"} and not isinstance(value, Mapping) and value is not None:
                found[*path, key] = f" for rope_type {rope.get('rope_type')!r}{did_you_mean(key, known)}"
    return found


def blocks(config: PreTrainedConfig) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Each set of rope parameters, one for all layers or one a layer type."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or not rope:
        return
    nested = [(key, value) for key, value in rope.items() if isinstance(value, Mapping)]
    for key, value in nested:
        yield ("rope_parameters", key), value
    if not nested:
        yield ("rope_parameters",), rope


def _instead(rope: Mapping[str, Any], key: str) -> str:
    unknown = [name for name in rope if name not in KEYS]
    hint = did_you_mean(key, unknown)
    return hint.replace("did you mean", "it has") if hint else ""
