"""Twins of the tested variants in which one thing is lost, each exported exactly: the comparison must fail.

Among them every row of design.md, section 10: what other exporters lose and exit 0. Each such row's variant passes in
test_families.py; here it is shown that it could not pass without what was lost.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import bridged
import pytest
import tiny_models
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from variants import LONG, VARIANTS, WINDOW, YARN, rope

from pe_onnx.errors import CheckpointError
from pe_onnx.models.families import bloom, gpt_neo, mpt
from pe_onnx.models.masks import Mask
from pe_onnx.models.substitution import Substitution, installed

LEAST = 0.01
"""Of the logits' spread: two hundred times what test_families.py allows."""

Break = Callable[[PreTrainedModel], Iterable[Substitution]]


@dataclass(frozen=True)
class Twin:
    """A variant of VARIANTS, with other options, or with a part of transformers' own code or weights changed."""

    variant: str
    options: dict[str, Any] | None = None
    broken: Break = lambda model: ()

    def build(self) -> PreTrainedModel:
        model_type, options = VARIANTS[self.variant]
        return tiny_models.build(model_type, **{**options, **(self.options or {})})


def zeroed(*parts: str) -> Break:
    """Parameters whose names contain one of the parts are 0."""

    def edit(model: PreTrainedModel) -> Iterable[Substitution]:
        found = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
        assert found
        for parameter in found:
            parameter.data.zero_()
        return ()

    return edit


def sinks_off(model: PreTrainedModel) -> Iterable[Substitution]:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-1e4)
    return ()


def attribute(kind: str, name: str, value: Any, only: int | None = None) -> Break:
    """Of the modules whose class name ends with kind, or of the one of that number."""

    def edit(model: PreTrainedModel) -> Iterable[Substitution]:
        found = [m for m in model.modules() if type(m).__name__.endswith(kind)]
        for module in found if only is None else found[only : only + 1]:
            yield Substitution(module, name, value)

    return edit


def home(model: PreTrainedModel) -> Any:
    return sys.modules[type(model).__module__]


def half_split(model: PreTrainedModel) -> Iterable[Substitution]:
    """Rotation of halves where the file rotates pairs; the same frequencies."""
    repeated = model.config.model_type == "cohere"  # its tables hold each frequency twice in a row

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        half = cos.shape[-1] // 2
        cos, sin = ((t[..., ::2] if repeated else t[..., :half]).repeat(1, 1, 2).unsqueeze(1) for t in (cos, sin))
        turn = lambda x: torch.cat((-x[..., half:], x[..., :half]), -1)  # noqa: E731
        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    yield Substitution(home(model), "apply_rotary_pos_emb", rotate)


def other_sign(model: PreTrainedModel) -> Iterable[Substitution]:
    rotate = home(model).apply_rotary_pos_emb
    yield Substitution(
        home(model), "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: rotate(q, k, cos, -sin)
    )


def norm_first(model: PreTrainedModel) -> Iterable[Substitution]:
    """Queries and keys normed before they are rotated, not after."""
    rotate, tables = home(model).apply_rotary_pos_emb, []

    def keep(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        tables[:] = [cos, sin]
        return q, k

    def late(norm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: rotate(norm(x), norm(x), *tables)[0]

    yield Substitution(home(model), "apply_rotary_pos_emb", keep)
    for name, module in model.named_modules():
        if name.endswith(("query_layernorm", "key_layernorm")):
            module.eps = "of its own"  # no plain norm any more
            yield Substitution(module, "forward", late(module.forward))


def always_long(model: PreTrainedModel) -> Iterable[Substitution]:
    """Dynamic NTK's frequencies of twice the trained length, at every length."""
    rotary: Any = model.model.rotary_emb
    long, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, None, seq_len=262)
    rotary.inv_freq.copy_(long)
    rotary.original_inv_freq.copy_(long)
    return ()


def no_bloom_slopes(model: PreTrainedModel) -> Iterable[Substitution]:
    for place in (home(model), bloom):
        yield Substitution(place, "_get_alibi_slopes", lambda heads, device: torch.zeros(heads))


def no_mpt_slopes(model: PreTrainedModel) -> Iterable[Substitution]:
    build = home(model).build_mpt_alibi_tensor
    yield Substitution(home(model), "build_mpt_alibi_tensor", lambda *args: torch.zeros_like(build(*args)))


def no_falcon_slopes(model: PreTrainedModel) -> Iterable[Substitution]:
    build = home(model).build_alibi_tensor
    yield Substitution(home(model), "build_alibi_tensor", lambda *args, **named: 0 * build(*args, **named))


SHORT = {**LONG, "long_factor": LONG["short_factor"]}
SWAPPED = {"layer_types": ["full_attention", "sliding_attention"]}
DEFAULT = rope("default")
NOPE = attribute("Attention", "use_rope", True)

SECTION_10 = {
    "linear scaling ignored": Twin("llama_linear", DEFAULT),
    "yarn scaling ignored": Twin("llama_yarn", DEFAULT),
    "longrope scaling ignored": Twin("llama_longrope", DEFAULT),
    "yarn truncate ignored": Twin("llama_yarn_truncate", rope("yarn", **YARN)),
    "yarn attention_factor ignored": Twin("llama_yarn_factor", rope("yarn", **YARN)),
    "yarn truncate ignored, gpt-oss": Twin("gpt_oss", rope("yarn", **YARN)),
    "dynamic NTK at every length": Twin("llama_dynamic", broken=always_long),
    "window dropped, mistral": Twin("mistral", {"sliding_window": None}),
    "window on the wrong layers, qwen2": Twin("qwen2_window", {"layer_types": ["sliding_attention", "full_attention"]}),
    "window on the wrong layers, gemma2": Twin("gemma2", SWAPPED),
    "window dropped, olmo3": Twin("olmo3", {"sliding_window": 1000}),
    "window dropped, gpt_neo": Twin("gpt_neo", {"attention_types": [[["global", "global"], 1]]}),
    "half-split for interleaved, cohere": Twin("cohere", broken=half_split),
    "half-split for interleaved, ernie4_5": Twin("ernie4_5", broken=half_split),
    "half-split for interleaved, helium": Twin("helium", broken=half_split),
    "NoPE layer rotated, exaone4": Twin("exaone4", broken=attribute("Attention", "is_sliding", True)),
    "NoPE layer rotated, cohere2": Twin("cohere2", broken=attribute("Attention", "sliding_window", WINDOW)),
    "rotation sign, nanochat": Twin("nanochat", broken=other_sign),
    "norm before rotation, hunyuan": Twin("hunyuan_v1_dense", broken=norm_first),
    "ALiBi dropped, bloom": Twin("bloom", broken=no_bloom_slopes),
    "ALiBi dropped, mpt": Twin("mpt", broken=no_mpt_slopes),
    "query scale, gemma3": Twin("gemma3_text", {"query_pre_attn_scalar": 16}),
    "score scale by layer, gpt2": Twin("gpt2_inverse", {"scale_attn_by_inverse_layer_idx": False}),
    "embedding scale, xglm": Twin("xglm", {"scale_embedding": False}),
    "embedding scale, biogpt": Twin("biogpt", {"scale_embedding": False}),
    "offset, xglm": Twin("xglm", broken=attribute("PositionalEmbedding", "offset", 0)),
    "offset, biogpt": Twin("biogpt", broken=attribute("PositionalEmbedding", "offset", 0)),
    "biases dropped, gptj": Twin("gptj", broken=zeroed("bias")),
    "biases dropped, codegen": Twin("codegen", broken=zeroed("lm_head.bias")),
    "biases dropped, persimmon": Twin("persimmon", broken=zeroed("query_key_value.bias")),
}
"""The table of design.md, section 10, row by row. Its padding mask, and its configurations on which other exporters
fall over, are tests of their own below."""

OTHERS = {
    "llama3 scaling": Twin("llama_llama3", DEFAULT),
    "yarn mscale": Twin("llama_yarn_mscale", rope("yarn", **YARN)),
    "longrope, short factors alone": Twin("llama_longrope", rope("longrope", **SHORT)),
    "dynamic NTK dropped": Twin("llama_dynamic", DEFAULT),
    "linear scaling of full layers, gemma3": Twin(
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            }
        },
    ),
    "offset, opt": Twin("opt", broken=attribute("PositionalEmbedding", "offset", 0)),
    "sink, gpt_oss": Twin("gpt_oss", broken=sinks_off),
    "window, gpt_oss": Twin("gpt_oss", {"sliding_window": 1000}),
    "soft-cap of scores, gemma2": Twin("gemma2", {"attn_logit_softcapping": None}),
    "soft-cap of logits, gemma2": Twin("gemma2", {"final_logit_softcapping": None}),
    "NoPE list, smollm3": Twin("smollm3", {"no_rope_layers": [1, 1]}),
    "NoPE list, llama4": Twin("llama4_text", {"no_rope_layers": [1, 1, 1, 1]}),
    "chunks, llama4": Twin("llama4_text", {"attention_chunk_size": 1000}),
    "temperature of positions, llama4": Twin("llama4_text", {"attn_temperature_tuning": False}),
    "bias, llama": Twin("llama_bias", broken=zeroed("q_proj.bias")),
    "ALiBi, falcon": Twin("falcon_alibi", broken=no_falcon_slopes),
    "rotation, roformer": Twin("roformer", broken=zeroed("embed_positions")),
}
TWINS = {**SECTION_10, **OTHERS}
FAST = {
    *("yarn truncate ignored", "dynamic NTK at every length", "half-split for interleaved, cohere"),
    *("ALiBi dropped, bloom", "NoPE layer rotated, cohere2", "norm before rotation, hunyuan"),
    *("score scale by layer, gpt2", "offset, xglm", "sink, gpt_oss", "soft-cap of scores, gemma2"),
}
"""One for each thing that can be lost; the others are a sweep."""
assert TWINS.keys() >= FAST


def swept(names: Iterable[str], fast: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def no_bias(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, len(slopes), queries.shape[1], keys.shape[1])


@functools.lru_cache(maxsize=1)
def references_of(variant: str) -> dict[str, bridged.Reference]:
    limits = {"gpt2_inverse", "gpt_neo", "gptj", "codegen", "opt", "biogpt", "roformer"}
    model = Twin(variant).build()
    return bridged.references(model, 131 if variant in limits else None, alone=variant == "llama4_text")


@pytest.mark.parametrize("name", swept(TWINS, FAST))
def test_twin_fails(name: str) -> None:
    twin = TWINS[name]
    model = twin.build()
    target = "ort" if sum(map(ord, name)) % 2 else "portable"
    with torch.no_grad(), installed(list(twin.broken(model))):
        exported = bridged.export(model, target)
    error = max(bridged.error(exported, reference) for reference in references_of(twin.variant).values())
    print(f"{name} {error:.2g}")
    assert error > LEAST


@pytest.mark.parametrize("variant", swept(["bloom", "mpt", "llama"], ["bloom"]))
def test_padding_mask_ignored_fails(variant: str) -> None:
    exported = bridged.export(Twin(variant).build(), "portable")
    reference = references_of(variant)["ragged"]
    assert bridged.error(exported, reference) < 5e-5
    assert bridged.error(exported, reference, mask_padding=False) > LEAST


@pytest.mark.parametrize("variant", swept(["llama", "gpt2", "xglm"], ["llama"]))
def test_stretched_positions_fail(variant: str) -> None:
    model = Twin(variant).build()
    exported = bridged.export(model, "portable")
    doubled = bridged.references(model, 60, position=lambda positions: 2 * positions)
    assert min(bridged.error(exported, reference) for reference in doubled.values()) > LEAST


@pytest.mark.parametrize(
    ("variant", "place", "name", "replacement"),
    [
        ("bloom", bloom, "alibi_bias", no_bias),
        ("mpt", mpt, "alibi_bias", no_bias),
        ("gpt_neo", gpt_neo, "replace", lambda mask, window: Mask()),
    ],
    ids=["bloom", "mpt", "gpt_neo"],
)
@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_family_file_that_loses_it_is_refused(
    variant: str, place: Any, name: str, replacement: Any, target: str
) -> None:
    """The bridge proves itself: a wrong substitution ends in one line, not in a file."""
    short = {"window_size": 10} if variant == "gpt_neo" else None  # within the tokens on which the bridge proves itself
    with installed([Substitution(place, name, replacement)]), pytest.raises(CheckpointError, match="off by"):
        bridged.export(Twin(variant, short).build(), target)
