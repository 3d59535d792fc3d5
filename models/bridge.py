"""The bridge: a transformers decoder as it is, with its attention kernel, its cache and its rotation replaced.

Positions, scalings, norms and layouts stay transformers' own code, so they cannot drift from it. Each replacement is
run against the original on random input, and the bridged module against the untouched one, before the export.
What the bridge alone does not carry stands in one file a family, ``models/families/``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from pe_onnx import discovery
from pe_onnx.contract import Target
from pe_onnx.errors import CheckpointError, PeOnnxError
from pe_onnx.models import checkpoint, complex_rotation, counted_positions, latent, rotation, switches
from pe_onnx.models.across import EncoderStep
from pe_onnx.models.attention import LayerCache, cached_step
from pe_onnx.models.config_origin import text_config
from pe_onnx.models.exportable import Exportable
from pe_onnx.models.half_precision import round_weights
from pe_onnx.models.interface import IMPLEMENTATION, BridgeCache, register, serving
from pe_onnx.models.masks import Mask
from pe_onnx.models.norms import prove_norms
from pe_onnx.models.observed import Observed, observe
from pe_onnx.models.proof import STEPS, Feed, Proof
from pe_onnx.models.substitution import Substitution, installed
from pe_onnx.tolerance import PROOF, tolerance_for


class BridgedDecoder(nn.Module):
    """A transformers causal LM behind the graph contract."""

    def __init__(
        self,
        model: PreTrainedModel,
        target: Target,
        last_only: bool,
        substitutions: list[Substitution],
        observed: Observed,
    ) -> None:
        super().__init__()
        self.model = model
        self.target = target
        self.last_only = last_only
        self.substitutions = substitutions
        self.latent = any(latent.is_latent(m) for m in model.modules())
        self.caches = [(K, D + E if self.latent else max(D, E)) for K, D, E in observed.shapes]
        if target == "ort":  # the fused attention wants whole groups of channels
            self.caches = [(K, -(-D // 16) * 16) for K, D in self.caches]
        self.takes_positions = takes_positions(model)
        self.first = observed.first
        shared = getattr(text_config(model.config), "num_kv_shared_layers", None) or 0
        self.layers = len(self.caches) + shared
        self.masks: list[Mask] = []
        """What the layers of the last run handed to attention."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[LayerCache],
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        step = cached_step(self.target, attention_mask, input_ids.shape[1], past_key_values)
        positions = position_ids + self.first if self.first else position_ids
        named = {"position_ids": positions} if self.takes_positions else {}
        cache = BridgeCache(step, self.caches)
        with replaced(self.model, cache, self.substitutions, step.last_token if self.last_only else None):
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **named
            ).logits
        self.masks = cache.masks
        if any(present is past_key_values[0] for present in step.presents):
            raise CheckpointError("not every layer's attention goes through transformers' attention interface")
        return logits.float(), step.presents


@contextmanager
def replaced(
    model: PreTrainedModel,
    serve: BridgeCache | EncoderStep,
    substitutions: Iterable[Substitution],
    last_token: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Our attention and masks in place of transformers', and the head on what last_token leaves of its input."""
    hooks = []
    if last_token is not None:
        head = model.get_output_embeddings()
        hooks.append(head.register_forward_pre_hook(lambda _, args: (last_token(args[0]), *args[1:])))
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [
        Substitution(config, f"_{kind}_implementation_internal", value)
        for config in configs.values()
        for kind, value in (("attn", IMPLEMENTATION), ("experts", "batched_mm"))
    ]
    try:
        with serving(serve), installed([*switched, *substitutions]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def from_checkpoint(
    path: Path,
    target: Target,
    last_only: bool,
    scaling: Mapping[str, Any] | None = None,
    follow: bool = False,
    dtype: str = "fp32",
) -> Exportable:
    """Bridge the checkpoint at ``path``, a Hugging Face folder or a GGUF file.

    scaling: a longer context, see rope_scaling.py. follow: let keys through that transformers ignores. dtype: that
    weights will have.

    Raises CheckpointError for weights that are missing or truncated, for a model or configuration that is not
    understood, and where the bridged module does not compute what transformers computes.
    """
    loaded = checkpoint.load(path, scaling, follow)
    model = loaded.model
    round_weights(model, dtype)
    module, observed, proof = bridge(model, target, last_only)
    return Exportable(
        module=module,
        caches=module.caches,
        layers=module.layers,
        max_length=observed.max_length,
        path_dependent=bool(switches.thresholds(model)),
        proof=proof,
        **described(loaded, path, scaling),
    )


def described(loaded: checkpoint.Loaded, path: Path, scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the files of a checkpoint say, as an Exportable has it."""
    text = text_config(loaded.model.config)
    return {
        "vocab_size": text.vocab_size,
        "encoding": loaded.encoding.name,
        "parameters": loaded.encoding.parameters,
        "ignored": loaded.encoding.ignored,
        "source": {
            "kind": "checkpoint",
            "path": str(path.resolve()),
            "model_type": text.model_type,
            "rope_scaling": dict(scaling) if scaling else None,
        },
        "trained_length": loaded.trained_length,
        "config": loaded.config_json,
        "generation_config": loaded.generation_config_json,
        "tokenizer": loaded.tokenizer,
        "write_assets": loaded.write_assets,
    }


def family(model: PreTrainedModel) -> ModuleType | None:
    """The file of the model's family, where it has one."""
    name = text_config(model.config).model_type
    return discovery.load("models.families", name) if name in discovery.names("models.families") else None


def untouched_attention(model: PreTrainedModel) -> str:
    """The implementation of transformers that a bundle is compared with."""
    return getattr(family(model), "ATTENTION", "eager")


def bridge(model: PreTrainedModel, target: Target, last_only: bool) -> tuple[BridgedDecoder, Observed, Proof]:
    """A model behind the graph contract, proven against itself. Raises CheckpointError with the reason."""
    register()
    own = family(model)
    model.config._attn_implementation = untouched_attention(model)
    rotaries = rotation.find(model)
    with torch.no_grad(), rotation.recorded(rotaries):
        observed = observe(model, takes_positions(model))
    substitutions = [s for r in rotaries if (s := rotation.prove(r)) is not None]
    substitutions += [*prove_norms(model), *complex_rotation.substitutions(model), *switches.substitutions(model)]
    substitutions += [*latent.substitutions(model), *counted_positions.substitutions(model)]
    if own is not None:
        substitutions += own.substitutions(model)
    if getattr(own, "ENDLESS", False):
        observed.max_length = None
    module = BridgedDecoder(model, target, last_only, substitutions, observed).eval()
    _reaches(module)  # a first run, which shows the masks
    _windows_agree(module)
    proof = prove(module, observed)
    return module, observed, proof


def prove(module: BridgedDecoder, observed: Observed) -> Proof:
    """Run the bridged module against the untouched model. Raises CheckpointError where they differ."""
    model, name = module.model, type(module.model).__name__
    switch = switches.thresholds(model)
    proof = Proof(
        observed.shapes,
        model.config.get_text_config(decoder=True).vocab_size,
        lambda row, prompt, past: untouched(model, row, prompt, past, observed.first),
        reaches=[*_reaches(module), *switch, *_configured(model)],
        limit=observed.max_length,
        alone=bool(switch),
        **({"cached": latent.cached} if module.latent else {}),
    )

    def run(feed: Feed, past: list[LayerCache]) -> tuple[torch.Tensor, list[LayerCache]]:
        return module(feed.input_ids, feed.attention_mask, feed.position_ids, past)

    with named_failures(module.model):
        error = proof.error(run, module.target, module.caches, torch.float32)
    if not error <= PROOF * tolerance_for("fp32", module.layers).error:
        counts = "" if module.takes_positions else "; it takes no position_ids, and may count from the cache's length"
        raise CheckpointError(
            f"{name} cannot be exported exactly: with its attention replaced its logits are off by {error:.1e} of "
            f"their spread{counts}"
        )
    return proof


@contextmanager
def named_failures(model: PreTrainedModel) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the model."""
    try:
        yield
    except Exception as failure:
        reason = str(failure).strip().split("\n", 1)[0]
        if not isinstance(failure, PeOnnxError):
            reason = f"with its attention replaced it fails: {reason}"
        name = type(model).__name__
        raise CheckpointError(f"{name} cannot be exported exactly: {reason}") from failure


def _windows_agree(module: BridgedDecoder) -> None:
    """Raises CheckpointError where transformers' cache forgets tokens that its masks show: its cached decode is then
    another than one pass over the same tokens."""
    layers = DynamicCache(config=module.model.config).layers
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    if windows and not any(mask.window > 0 or mask.chunk for mask in module.masks):
        name = type(module.model).__name__
        raise CheckpointError(
            f"{name} contradicts itself: transformers' cache keeps the last {windows[0]} tokens, and its mask shows all"
        )


def _configured(model: PreTrainedModel) -> list[int]:
    """Windows and chunks of the configuration, whether or not a layer's mask shows one."""
    values = model.config.get_text_config(decoder=True).to_dict().items()
    return [n for key, n in values if ("window" in key or "chunk" in key) and type(n) is int]


@torch.no_grad()
def _reaches(module: BridgedDecoder) -> list[int]:
    """Tokens of every window and chunk that the layers hand to attention."""
    with named_failures(module.model):
        past: list[LayerCache] = [(torch.zeros(1, K, 0, D),) * 2 for K, D in module.caches]
        ids = torch.zeros(1, 3, dtype=torch.int64)
        module(ids, torch.ones_like(ids), torch.arange(3)[None], past)
    return [n for mask in module.masks for n in (mask.window, mask.chunk)]


@torch.no_grad()
def untouched(
    model: PreTrainedModel, row: torch.Tensor, prompt: int, past: list[LayerCache], first: int = 0
) -> list[torch.Tensor]:
    """transformers' own cached decode of one row, its prompt and each step. first: its first position."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(past):
        cache.update(key, value, layer)
    begin, before = 0, past[0][0].shape[2] if past else 0
    named: dict[str, Any] = {}
    if not before:  # rotary modules remember the longest sequence: a short one makes them forget it
        model(input_ids=row[None, :1], use_cache=False)
    result = []
    for end in (prompt, *range(prompt + 1, prompt + STEPS + 1)):
        mask = torch.ones(1, before + end, dtype=torch.int64)
        if takes_positions(model):
            named["position_ids"] = first + torch.arange(before + begin, before + end)[None]
        ids = row[None, begin:end]
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **named)
        result.append(output.logits[0].float())
        begin = end
    return result
