"""``--rope-scaling``: a longer context for a checkpoint that has plain RoPE, as one writes it into its config.json.

R: rotary channels; L: ``max_position_embeddings`` before; s: ``factor``. L grows to s L, except for ``dynamic``, which
reads it as the trained length.

    linear    angles over s
    ntk       theta s^(R/(R-2)) at every length (bloc97, "NTK-aware scaled RoPE")
    dynamic, yarn, longrope, llama3    as transformers computes them, with original_max_position_embeddings = L
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from pe_onnx.errors import ConfigError, did_you_mean
from pe_onnx.models import rope_types
from pe_onnx.models.config_keys import Kind

OPTION = "--rope-scaling"
Values = dict[str, Any]


@dataclass(frozen=True)
class Extension:
    """One way to extend: the keys it needs and takes, and the rope parameters it makes of them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parameters: Callable[[int, Mapping[str, Any], Values], Values]
    """R, the rope parameters before, the keys given -> what changes in them."""
    grows: bool = True
    """Whether max_position_embeddings grows by the factor."""


def _by_type(kind: str, needs: tuple[str, ...] = (), grows: bool = True) -> Extension:
    known = rope_types.TYPES[kind]
    required = tuple(key for key in known.required if key != rope_types.ORIGINAL) + needs
    return Extension(
        required,
        tuple(key for key in known.optional if key not in needs),
        lambda R, rope, given: {"rope_type": kind, **given},
        grows,
    )


def _ntk(R: int, rope: Mapping[str, Any], given: Values) -> Values:
    return {"rope_theta": float(rope["rope_theta"]) * given["factor"] ** (R / (R - 2))}


EXTENSIONS: dict[str, Extension] = {
    "linear": _by_type("linear"),
    "ntk": Extension(("factor",), (), _ntk),
    "dynamic": _by_type("dynamic", grows=False),
    "yarn": _by_type("yarn"),
    "longrope": _by_type("longrope", needs=("factor",)),
    "llama3": _by_type("llama3"),
}


def parse(spec: str | Mapping[str, Any]) -> Values:
    """``"yarn:factor=4,beta_fast=16"``, or the same as a mapping with its ``rope_type``, to checked values.

    A list is written with slashes, ``short_factor=1/1.5/2``. Raises ConfigError.
    """
    if isinstance(spec, str):
        kind, _, rest = spec.partition(":")
        items = [item.partition("=") for item in rest.split(",")] if rest else []
        wrong = next(("".join(item) for item in items if not all(item)), None)
        if wrong is not None:
            raise ConfigError(f"{OPTION} {kind}: {wrong!r} must be key=value")
        given: Values = {key.strip(): _value(text.strip()) for key, _, text in items}
    else:
        given = dict(spec)
        kind = str(given.pop("rope_type", ""))
    if kind not in EXTENSIONS:
        raise ConfigError(f"{OPTION} {kind!r} must be one of {', '.join(EXTENSIONS)}{did_you_mean(kind, EXTENSIONS)}")
    extension = EXTENSIONS[kind]
    accepted = (*extension.required, *extension.optional)
    for key, value in given.items():
        if key not in accepted:
            raise ConfigError(
                f"{OPTION} {kind}: unknown key {key!r}{did_you_mean(key, accepted)} (accepted: {', '.join(accepted)})"
            )
        known: Kind = rope_types.KEYS[key]
        if value is None or not known.accepts(value):
            raise ConfigError(f"{OPTION} {kind}: {key} = {value!r} must be {known.text}")
    missing = [key for key in extension.required if key not in given]
    if missing:
        raise ConfigError(f"{OPTION} {kind} needs {', '.join(missing)}: {kind}:{'=...,'.join(missing)}=...")
    return {"rope_type": kind, **given}


def apply(config: PreTrainedConfig, scaling: Mapping[str, Any]) -> int:
    """Write the scaling into the configuration of a text model. Returns the length it is meant for, in tokens.

    Raises ConfigError where there is no rope, one that is scaled already, or one for each layer type.
    """
    blocks = list(rope_types.blocks(config))
    if not blocks:
        raise ConfigError(f"{OPTION}: {config.model_type} has no rope parameters to scale")
    if len(blocks) > 1 or len(blocks[0][0]) > 1:
        raise ConfigError(
            f"{OPTION}: the rope parameters of {config.model_type} differ by layer type; edit config.json"
        )
    rope = blocks[0][1]
    before = rope.get("rope_type", "default")
    if before != "default":
        raise ConfigError(f"{OPTION}: the checkpoint has a scaling already, rope_type = {before!r}")
    given = {key: value for key, value in scaling.items() if key != "rope_type"}
    extension = EXTENSIONS[scaling["rope_type"]]
    R, trained = rope_types.rotary_size(config, rope), getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int):
        raise ConfigError(f"{OPTION}: {config.model_type} has no max_position_embeddings to scale")
    parameters = {**rope, **extension.parameters(R, rope, given)}
    reach = int(trained * given["factor"])
    if extension.grows:
        config.max_position_embeddings = reach
    if rope_types.ORIGINAL in rope_types.TYPES[parameters["rope_type"]].required:
        parameters[rope_types.ORIGINAL] = trained
        if hasattr(config, rope_types.ORIGINAL):  # where it is there, transformers takes it from there
            config.original_max_position_embeddings = trained
    config.rope_parameters = parameters
    rope_types.check(config, OPTION)
    return reach


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text in words:
        return words[text]
    try:
        if "/" in text:
            return [float(part) for part in text.split("/")]
        return float(text) if not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        return text
