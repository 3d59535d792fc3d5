"""What a checkpoint's configuration says of positions: each key with its value and origin, or refused by name.

Values are those transformers resolved; the origin says whether the file names the key (in the old or the new spelling)
or transformers filled it in. A key that bears on positions and that neither transformers nor we know is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pe_onnx.errors import CheckpointError, did_you_mean

COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
ROPE_KEYS = {
    "default": COMMON,
    "linear": COMMON | {"factor"},
    "llama3": COMMON | {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": COMMON | {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
"""RoPE types whose angles do not depend on the length of the sequence, and the keys transformers reads for each."""

BEARS_ON_POSITIONS = re.compile(r"rope|rotary|alibi|position|nope|relative|sliding|window")
OLD_SPELLINGS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "max_window_layers"})

Parameters = dict[str, dict[str, Any]]


def read_encoding(model: PreTrainedModel, raw: Mapping[str, Any] | None) -> tuple[str, Parameters, int | None]:
    """Name, parameters with their origins, and the hard limit on positions of a model's encoding.

    raw: the config.json as it stands, or None for a GGUF file. Raises CheckpointError for what is not understood.
    """
    config = model.config.get_text_config(decoder=True)
    if raw is not None:
        _refuse_unknown(config, raw)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        parameters = _rope(config, rope, raw)
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            parameters["sliding_window"] = {"value": window, "origin": _origin("sliding_window", raw)}
        return "rope", parameters, None
    tables = (m for name, m in model.named_modules() if name.endswith("wpe") and isinstance(m, nn.Embedding))
    table = next(tables, None)
    if table is not None and config.model_type == "gpt2":
        spelled = "n_positions" if raw and "n_positions" in raw else "max_position_embeddings"
        entry = {"value": table.num_embeddings, "origin": _origin(spelled, raw)}
        return "learned", {"max_position_embeddings": entry}, table.num_embeddings
    raise CheckpointError(f"model_type = {config.model_type!r} is not supported yet: its encoding is not known")


def _rope(config: PreTrainedConfig, rope: Mapping[str, Any], raw: Mapping[str, Any] | None) -> Parameters:
    kind = rope.get("rope_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{config.model_type}: rope_parameters differ by layer type, not supported yet")
    if kind not in ROPE_KEYS:
        hint = did_you_mean(kind, ROPE_KEYS)
        raise CheckpointError(f"rope_type = {kind!r} is not supported yet{hint} (supported: {', '.join(ROPE_KEYS)})")
    for key in rope:
        if key not in ROPE_KEYS[kind]:
            hint = did_you_mean(key, ROPE_KEYS[kind])
            raise CheckpointError(f"rope_parameters: nothing reads {key!r} for rope_type {kind!r}{hint}")
    return {key: {"value": value, "origin": _origin(key, raw)} for key, value in rope.items() if key != "type"}


def _origin(key: str, raw: Mapping[str, Any] | None) -> str:
    if raw is None:
        return "GGUF metadata"
    places = (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {})
    spelled = ("rope_type", "type") if key == "rope_type" else (key,)
    named = any(name in place for place in places for name in spelled)
    return "config.json" if named else "transformers' default"


def _refuse_unknown(config: PreTrainedConfig, raw: Mapping[str, Any]) -> None:
    """Refuse a key about positions that the configuration class does not have, unless its value is none or false."""
    attribute_map = getattr(type(config), "attribute_map", {})
    known = {*type(config)().to_dict(), *attribute_map, *attribute_map.values(), *OLD_SPELLINGS}
    for key, value in raw.items():
        if BEARS_ON_POSITIONS.search(key) and key not in known and value:
            raise CheckpointError(f"config.json: nothing in {config.model_type} reads {key!r} = {value!r}")
