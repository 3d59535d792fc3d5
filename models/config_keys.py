"""Keys of a config.json that bear on positions or attention: how they are recognised, and the values they can have.

transformers 5.23 logs a warning for many a value out of range, or none; here each is refused, with its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from pe_onnx.errors import CheckpointError

BEARS = re.compile(
    r"rope|rotary|alibi|pos_emb|posit|nope|relative|\brel_|sinusoid|sliding|window|swa|local_|global_|layer_types|attn"
    r"|block_type|attention|head|kv_|_kv|qk|query|soft_?cap|sink|bucket|seq_len|n_ctx|context_len|max_len|chunk|causal"
    r"|bidirectional"
)
BEARS_NOT = re.compile(
    r"^encoder_|drop|implementation|attn_impl|flash|init|lm_head|router|expert|moe|mlp|mamba|ssm|conv|linear_|image|vision|audio"
    r"|feed_forward|output_attentions|gradient|quantization|label|summary|task|token_id|cross_attention"
    r"|dtype|_fp32|js_config|init_config"
)

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "seq_length",
    "n_ctx",
    "context_length",
)
"""Names of the trained length, the first that a configuration has; read by us where the model does not."""

SWITCHED_OFF_BY = {
    "sliding_window": ("use_sliding_window",),
    "max_window_layers": ("use_sliding_window", "sliding_window"),
}
"""Keys without a meaning while another one is false or null."""
NO_REQUEST = {
    "rotary": (True,),
    "use_rotary_pos_emb": (True,),
    "position_embedding_type": ("rope_gptj", "rope"),
    "rotary_scaling_factor": (1.0,),
    "scale_attn_weights": (True,),
    "rotary_pct": (1.0,),
    "full_attn_mod": (1,),
    "offset_alibi": (100,),
    "finetuned": (True, False),
}
"""Values in published files, of keys that transformers does not read, that ask for what the model does anyway."""
OF_LAYERS = {"sliding_window": "sliding", "attention_chunk_size": "chunked"}
"""Keys without a meaning where ``layer_types`` has no such layers."""

GENERIC = frozenset({*PreTrainedConfig().to_dict(), "_name_or_path", "model_type", "output_attentions"})
"""Keys of every configuration, and so of each part of one."""

Path = tuple[str, ...]


def bears(path: Path) -> bool:
    """Whether the leaf at ``path`` is about positions or attention."""
    bears = any(BEARS.search(key) for key in path) and not any(BEARS_NOT.search(key) for key in path)
    return bears and path[-1] not in GENERIC


def leaves(values: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each value that is no dictionary, or an empty one, with the keys that lead to it."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


@dataclass(frozen=True)
class Kind:
    """The values that a key can have."""

    text: str
    accepts: Callable[[Any], bool]
    nullable: bool = False

    def check(self, path: Path, value: Any, where: str = "config.json") -> None:
        """Raises CheckpointError."""
        if not (value is None and self.nullable) and not self.accepts(value):
            or_null = " or null" if self.nullable else ""
            raise CheckpointError(f"{where}: {'.'.join(path)} = {shown(value)} must be {self.text}{or_null}")


def shown(value: Any) -> str:
    """As config.json spells it, on one line and not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(accepts(item) for item in value)


COUNT = Kind("a positive integer", lambda v: _is_integer(v) and v > 0)
COUNT_OR_NULL = Kind(COUNT.text, COUNT.accepts, nullable=True)
INDEX_OR_NULL = Kind("an integer from 0", lambda v: _is_integer(v) and v >= 0, nullable=True)
POSITIVE = Kind("a positive number", _positive)
POSITIVE_OR_NULL = Kind(POSITIVE.text, _positive, nullable=True)
FROM_ONE = Kind("a number from 1", lambda v: is_number(v) and v >= 1)
FROM_ONE_OR_NULL = Kind(FROM_ONE.text, FROM_ONE.accepts, nullable=True)
ABOVE_ONE = Kind("a number above 1", lambda v: is_number(v) and v > 1)
SHARE = Kind("a number above 0 and up to 1", lambda v: is_number(v) and 0 < v <= 1)
SHARE_OR_NULL = Kind(SHARE.text, SHARE.accepts, nullable=True)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
FLAG_OR_NULL = Kind(FLAG.text, FLAG.accepts, nullable=True)
PATTERN_OR_NULL = Kind("a positive integer or letters", lambda v: COUNT.accepts(v) or isinstance(v, str), nullable=True)
FROM_ZERO_OR_NULL = Kind("a number from 0", lambda v: is_number(v) and v >= 0, nullable=True)
NAME = Kind("a name", lambda v: isinstance(v, str))
NAMES_OR_NULL = Kind("a list of names", _list_of(lambda v: isinstance(v, str)), nullable=True)
FLAGS_OR_NULL = Kind("a list of 0 and 1", _list_of(lambda v: v in (0, 1)), nullable=True)
FACTORS = Kind("a list of positive numbers", _list_of(_positive))
NUMBERS = Kind("a list of positive numbers and nulls", _list_of(lambda v: v is None or _positive(v)))
SECTIONS = Kind("a list of integers", _list_of(_is_integer))
TREE_OR_NULL = Kind("an object", lambda v: isinstance(v, Mapping), nullable=True)

KINDS: tuple[tuple[re.Pattern[str], Kind], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (
            r"alibi|use_alibi|rope_interleaved?|attention_bias|qkv_bias|use_sliding_window|use_qk_norm|qk_layernorm",
            FLAG_OR_NULL,
        ),
        (
            r"multi_query|new_decoder_architecture|attn_temperature_tuning|scale_attn.*|reorder_and_upcast_attn",
            FLAG_OR_NULL,
        ),
        (r"rope_parameters|rope_scaling|attn_config", TREE_OR_NULL),
        (r"(num_)?(attention_|n_)?heads?|num_.*_heads|n_heads?|encoder_.*heads|decoder_.*heads", COUNT_OR_NULL),
        (r"(num_|n_)(.*_)?kv_heads|n_head_kv|num_query_groups", COUNT_OR_NULL),
        ("|".join(LENGTHS[:3]), COUNT),
        ("|".join(LENGTHS[3:]), COUNT_OR_NULL),
        (r"original_max_position_embeddings", COUNT),
        (r"(.*_)?head_dim|kv_channels|.*_lora_rank|attention_head_size|d_kv", COUNT_OR_NULL),
        (r"rotary_dim", INDEX_OR_NULL),
        (r"(.*_)?window(_size)?|attention_chunk_size|(local_)?attention_window(_size|_len)?", INDEX_OR_NULL),
        (r"max_window_layers", INDEX_OR_NULL),
        (r".*(attn|attention)_logit_soft_?cap(ping)?", POSITIVE_OR_NULL),
        (r"query_pre_attn_scalar|attention_multiplier|softmax_scale", POSITIVE_OR_NULL),
        (r"clip_qkv", POSITIVE_OR_NULL),
        (r"layer_rope_theta", NUMBERS),
        (r"rotary_emb_base|(.*_)?rope_theta|rope_local_base_freq", POSITIVE_OR_NULL),
        (r"rotary_pct|partial_rotary_factor|rope_pct", SHARE_OR_NULL),
        (r"layer_types|layers_block_type|attention_layers", NAMES_OR_NULL),
        (r"no_rope_layers", FLAGS_OR_NULL),
        (r"_?sliding_window_pattern", PATTERN_OR_NULL),
        (r"no_rope_layer_interval|global_attn_every_n_layers", COUNT_OR_NULL),
        (r"alibi_bias_max|relative_attention_num_buckets|relative_attention_max_distance", COUNT),
    )
)
"""Whole names, tried in this order; the entries of rope parameters stand in rope_types.py."""


def check(raw: Mapping[str, Any], config_class: type[PreTrainedConfig], where: str) -> None:
    """Refuse a value out of range before transformers sees it; class defaults are let through. Raises CheckpointError.

    raw: config.json, of the text model where there are several.
    """
    for path, value in _unit_leaves(raw):
        kind = next((kind for pattern, kind in KINDS if pattern.fullmatch(path[-1])), None)
        default = getattr(config_class, path[-1], kind)
        if kind is not None and (type(value), value) != (type(default), default):
            kind.check(path, value, where)


def _unit_leaves(values: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Keys at every depth, each dictionary itself among them; rope parameters only as a whole."""
    for key, value in values.items():
        path = (*prefix, str(key))
        if bears(path):
            yield path, value
        if isinstance(value, Mapping) and key not in ("rope_parameters", "rope_scaling"):
            yield from _unit_leaves(value, path)


def check_shapes(config: PreTrainedConfig, where: str) -> None:
    """Refuse resolved values that contradict each other. Raises CheckpointError."""
    heads, groups = (_attribute(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        spelled = _spelled(config, "num_key_value_heads")
        raise CheckpointError(
            f"{where}: {spelled} = {groups} must divide {_spelled(config, 'num_attention_heads')} = {heads}"
        )
    width = _attribute(config, "hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and width % heads and not _attribute(config, "head_dim"):
        raise CheckpointError(
            f"{where}: {_spelled(config, 'num_attention_heads')} = {heads} must divide "
            f"{_spelled(config, 'hidden_size')} = {width}"
        )
    buckets, reach = (_attribute(config, f"relative_attention_{name}") for name in ("num_buckets", "max_distance"))
    if isinstance(buckets, int) and isinstance(reach, int) and (buckets < 4 or reach <= buckets // 2):
        raise CheckpointError(
            f"{where}: relative_attention_max_distance = {reach} must be more than half of "
            f"relative_attention_num_buckets = {buckets}, which must be at least 4"
        )
    layers = _attribute(config, "num_hidden_layers")
    for name in ("layer_types", "no_rope_layers", "layers_block_type", "attention_layers"):
        values = _attribute(config, name)
        if isinstance(values, list) and isinstance(layers, int) and len(values) != layers:
            raise CheckpointError(
                f"{where}: {name} has {len(values)} entries and must have one for each of the {layers} layers"
            )
    size, rotary = _attribute(config, "head_dim"), _attribute(config, "rotary_dim")
    if size is None and isinstance(width, int) and isinstance(heads, int):
        size = width // heads
    if isinstance(rotary, int) and (rotary % 2 or (isinstance(size, int) and rotary > size)):
        raise CheckpointError(f"{where}: rotary_dim = {rotary} must be even and at most the head's {size} channels")


def _attribute(config: PreTrainedConfig, name: str) -> Any:
    """None also where the layers differ."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _spelled(config: PreTrainedConfig, name: str) -> str:
    return type(config).attribute_map.get(name, name)
