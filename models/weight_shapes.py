"""Weights whose shapes are not those of the configuration: which keys of it ask for another shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pe_onnx.models.config_keys import leaves, shown
from pe_onnx.models.config_origin import others, put


def explain(config: PreTrainedConfig, mismatched: Sequence[Any]) -> str:
    """``k_proj.weight is [32, 64], and [64, 64] by num_key_value_heads = 4``.

    mismatched: transformers' triples of a weight's name and its two shapes. Each integer of the configuration is
    changed in turn, and the model built again without memory for its weights.
    """
    name, held, wanted = sorted(mismatched, key=lambda triple: str(triple[0]))[0]
    values = config.to_dict()
    keys = []
    for path, value in leaves(values):
        if isinstance(value, int) and not isinstance(value, bool):
            shapes = (_shape(type(config), put(values, path, other), name) for other in others(value))
            if next((shape for shape in shapes if shape is not None), wanted) != wanted:
                keys.append(f"{'.'.join(path)} = {shown(value)}")
    more = f" and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
    return f"{name}{more}: {list(held)} in the file, {list(wanted)} by {', '.join(keys) or 'its configuration'}"


def _shape(config_class: type[PreTrainedConfig], values: dict[str, Any], name: str) -> torch.Size | None:
    """None where no model can be built of the values."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_class.from_dict(values))
        return model.state_dict()[name].shape
    except Exception:
        return None
