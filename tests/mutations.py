"""Random mutations of valid configurations: a key renamed, a value out of range, of another type or null, an unknown
scaling type, a list of a wrong length. Deterministic for a seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

HALF = [1.0 + 0.25 * i for i in range(8)]
"""One for each pair of the 16 channels of a head."""


def rope(kind: str, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **others}}


LONG = {"short_factor": HALF, "long_factor": [4 * x for x in HALF], "factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0}
LAYERED = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}}
WINDOWED = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}


def old_spelling(values: dict[str, Any]) -> None:
    """As transformers 4 wrote it."""
    scaling = values.pop("rope_parameters")
    values["rope_theta"] = scaling.pop("rope_theta")
    values["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}


def as_qwen_writes_it(values: dict[str, Any]) -> None:
    values.pop("layer_types")


@dataclass(frozen=True)
class Base:
    """A valid configuration."""

    model_type: str
    config: dict[str, Any]
    edit: Callable[[dict[str, Any]], None] | None = None


ONE = {"num_hidden_layers": 1}
BASES = {
    "llama": Base("llama", {**ONE, **rope("default")}),
    "llama_old_linear": Base("llama", {**ONE, **rope("linear", factor=4.0)}, old_spelling),
    "llama_dynamic": Base("llama", {**ONE, **rope("dynamic", factor=4.0)}),
    "llama_yarn": Base("llama", {**ONE, **rope("yarn", **YARN, attention_factor=1.25, truncate=False)}),
    "llama_old_yarn": Base("llama", {**ONE, **rope("yarn", **YARN)}, old_spelling),
    "llama_longrope": Base("llama", {**ONE, **rope("longrope", **LONG, original_max_position_embeddings=32)}),
    "llama_llama3": Base("llama", {**ONE, **rope("llama3", **LLAMA3)}),
    "qwen2_window": Base("qwen2", {**WINDOWED}, as_qwen_writes_it),
    "mistral_window": Base("mistral", {**ONE, "sliding_window": 30, **rope("default")}),
    "gemma2": Base("gemma2", {"sliding_window": 30, "query_pre_attn_scalar": 20}),
    "gemma3": Base(
        "gemma3_text",
        {
            "sliding_window": 30,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {**LAYERED, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}},
        },
    ),
    "smollm3": Base("smollm3", {"no_rope_layers": [1, 0], **rope("default")}),
    "gpt_neox": Base("gpt_neox", {**ONE, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "gpt2": Base("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}

Path = tuple[str, ...]


@dataclass(frozen=True)
class Mutation:
    """One change of one key."""

    base: str
    path: Path
    what: str
    config: dict[str, Any]
    names: tuple[str, ...]
    """What the refusal may call the key."""


ABOUT = ("rope", "attn", "attention", "head", "position", "window", "layer_types", "softcap", "scalar", "factor")
NOT_ABOUT = ("cross", "dropout", "bias", "pdrop", "softcapping_final", "lm_head", "final")


def keys(values: dict[str, Any], prefix: Path = ()) -> Iterator[Path]:
    """Paths of what is about positions or attention, dictionaries among them."""
    for key, value in values.items():
        path = (*prefix, key)
        if any(a in part for part in path for a in ABOUT) and not any(n in key for n in NOT_ABOUT):
            yield path
        if isinstance(value, dict):
            yield from keys(value, path)


def renamed(key: str, rng: random.Random) -> str:
    """A slip of the pen."""
    i = rng.randrange(1, len(key) - 1)
    slips = (
        key[:i] + key[i + 1] + key[i] + key[i + 2 :],
        key[:i] + key[i + 1 :],
        key[:i] + key[i] + key[i:],
        key + "s",
    )
    return next(slip for slip in rng.sample(slips, 4) if slip != key)


def out_of_range(value: Any, rng: random.Random) -> Any:
    by_type: dict[type, list[Any]] = {
        bool: ["yes", 2],
        int: [-value if isinstance(value, int) else 0, 0, "many", 2.5, [1]],
        float: [-1.0, 0.0, "much", 1e400, [1.0]],
        str: ["nothing", 3, ["yarn"]],
        list: [[], [-1] * len(value) if isinstance(value, list) else 0, value and "all", [None]],
        dict: [[], 1, "default"],
        type(None): [-1, "none", []],
    }
    return rng.choice(by_type[type(value)])


def wrong_length(value: Any, rng: random.Random) -> Any:
    return rng.choice([value[:-1], value + value[:1], value * 2])


def null(value: Any, rng: random.Random) -> Any:
    return None


def unknown_type(value: Any, rng: random.Random) -> Any:
    return rng.choice(["yarnn", "ntk", "Linear", "su", "mrope", ""])


def other(value: Any, rng: random.Random) -> Any:
    """A value that is valid, or nearly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(value * rng.choice([2, 3])) if value else 1
    return list(reversed(value)) if isinstance(value, list) else value


def put(values: dict[str, Any], path: Path, change: Callable[[dict[str, Any], str], None]) -> dict[str, Any]:
    result = copy.deepcopy(values)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return result


KINDS: dict[Callable[[Any, random.Random], Any], tuple[int, Callable[[Path, Any], bool]]] = {
    out_of_range: (6, lambda path, value: True),
    null: (2, lambda path, value: value is not None),
    other: (2, lambda path, value: isinstance(value, bool | int | float | list)),
    wrong_length: (2, lambda path, value: isinstance(value, list)),
    unknown_type: (1, lambda path, value: path[-1] in ("rope_type", "type")),
}
"""Changes of a value, how often, and of which keys."""
RENAMED = 6
"""How often a key is renamed."""


def mutations(configs: dict[str, dict[str, Any]], count: int, seed: int = 0) -> list[Mutation]:
    """configs: the config.json of each of BASES."""
    rng = random.Random(seed)
    found: list[Mutation] = []
    while len(found) < count:
        base = rng.choice(sorted(configs))
        values = configs[base]
        path = rng.choice(list(keys(values)))
        if rng.random() < RENAMED / (RENAMED + sum(weight for weight, _ in KINDS.values())):
            name = renamed(path[-1], rng)
            config = put(values, path, lambda inner, key, name=name: inner.update({name: inner.pop(key)}))
            found.append(Mutation(base, path, f"renamed {name}", config, (name, path[-1])))
            continue
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        paths = [path for path in keys(values) if KINDS[kind][1](path, at(values, path))]
        if not paths:
            continue
        path = rng.choice(paths)
        before = at(values, path)
        after = kind(before, rng)
        if after == before and type(after) is type(before):
            continue
        config = put(values, path, lambda inner, key, after=after: inner.update({key: after}))
        found.append(Mutation(base, path, f"{kind.__name__} {after!r}", config, (path[-1],)))
    return found


def at(values: dict[str, Any], path: Path) -> Any:
    for key in path:
        values = values[key]
    return values
