"""What a checkpoint says of positions and attention: each key with its value and origin, or refused by name.

Values are those transformers resolved. The origin says whether the file names the key, in whatever spelling, the
command line does, or transformers filled it in. A key of the file that nothing reads is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_onnx import discovery
from pe_onnx.errors import CheckpointError
from pe_onnx.models import config_keys, rope_types
from pe_onnx.models.config_keys import LENGTHS, Path
from pe_onnx.models.config_origin import Origins
from pe_onnx.models.config_reads import Reads
from pe_onnx.models.observed import Observed

DEFAULT = "transformers' default"
TABLES = {"learned": "learned", "fixed": "sinusoidal"}
"""Tables of positions, as observed.py calls them, to encodings."""

Parameters = dict[str, dict[str, Any]]


@dataclass
class Encoding:
    """Of a checkpoint."""

    name: str
    parameters: Parameters
    """Name to {"value", "origin"}."""
    ignored: dict[str, Any] = field(default_factory=dict)
    """Keys that bear on positions or attention, that transformers ignores, and that were let through."""


def read_encoding(origins: Origins, reads: Reads, observed: Observed, where: str, follow: bool = False) -> Encoding:
    """where: what the file is called. follow: let keys through that transformers ignores.

    Raises CheckpointError for a key that nothing reads.
    """
    config, ignored = origins.config, {}
    for path, value, remark in origins.without_effect(reads):
        ignored[".".join(path)] = value
        if not follow:
            raise CheckpointError(
                f"{where}: nothing in {config.model_type} reads {'.'.join(path)} = {config_keys.shown(value)}{remark} "
                f"(--follow-transformers leaves it out, as transformers does)"
            )
    called = name(config, reads, observed)
    rope = _rope(origins, reads, where) if called == "rope" else {}
    return Encoding(called, {**rope, **_others(origins, reads, where)}, ignored)


def refuse_misspelt(origins: Origins, where: str) -> None:
    """Raises CheckpointError for a key that looks like a known one; called before weights are read by its default."""
    for path, _ in origins.leaves():
        near = origins.misspelt(path[0])
        if near is not None:
            raise CheckpointError(
                f"{where}: nothing in {origins.config.model_type} reads {path[0]} = "
                f"{config_keys.shown(origins.raw[path[0]])}; did you mean {near!r}?"
            )


def name(config: PreTrainedConfig, reads: Reads, observed: Observed) -> str:
    """What the family's file says, else rope where the model reads rope parameters, else the table it was seen to
    read."""
    families = "models.families"
    if config.model_type in discovery.names(families):
        own = getattr(discovery.load(families, config.model_type), "ENCODING", None)
        if own is not None:
            return own(config) if callable(own) else own
    return "rope" if _reads_rope(config, reads) else TABLES.get(observed.table or "", "none")


def _reads_rope(config: PreTrainedConfig, reads: Reads) -> bool:
    return any(reads.includes(config, (*path, "rope_theta")) for path, _ in rope_types.blocks(config))


def _rope(origins: Origins, reads: Reads, where: str) -> Parameters:
    """Rope parameters and what transformers takes for those that are not there."""
    found: Parameters = {}
    config = origins.config
    for path, rope in rope_types.blocks(config):
        kind = rope_types.TYPES[rope.get("rope_type", "default")]
        values = {**kind.defaults, **{k: v for k, v in rope.items() if v is not None and k != "type"}}
        if "attention_factor" in kind.optional and "attention_factor" not in values:
            layer_type = path[1] if len(path) > 1 else None
            compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
            values["attention_factor"] = compute(config, "cpu", layer_type=layer_type)[1]
        for key, value in values.items():
            leaf = (*path, key)
            if leaf not in origins.resolved or _is_listed(origins, reads, leaf):
                prefix = "" if len(path) == 1 else f"{'.'.join(path)}."
                found[prefix + key] = {"value": value, "origin": _origin(origins, leaf, where)}
    return found


def _others(origins: Origins, reads: Reads, where: str) -> Parameters:
    return {
        ".".join(path): {"value": value, "origin": _origin(origins, path, where)}
        for path, value in sorted(origins.resolved.items())
        if path[0] != "rope_parameters"
        and value is not None
        and config_keys.bears(path)
        and _is_listed(origins, reads, path)
    }


def _is_listed(origins: Origins, reads: Reads, path: Path) -> bool:
    known = origins.is_known(path[0]) or reads.includes(origins.config, path)
    return known and (path in origins.given or path[-1] in LENGTHS or reads.includes(origins.config, path))


def _origin(origins: Origins, path: Path, where: str) -> str:
    if path in origins.commanded:
        return "command line"
    return where if path in origins.given else DEFAULT


def trained_length(config: PreTrainedConfig) -> int | None:
    """Tokens the model was trained on, by the first of the names that families have for it."""
    lengths: Mapping[str, Any] = {key: getattr(config, key, None) for key in LENGTHS}
    return next((value for value in lengths.values() if isinstance(value, int)), None)
