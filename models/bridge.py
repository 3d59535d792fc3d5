"""The bridge: a transformers decoder as it is, with its attention kernel, its cache and its rotation replaced.

Positions, scalings, norms and layouts stay transformers' own code, so they cannot drift from it. What a layer hands
to the attention interface (``scaling``, ``sliding_window``, ``softcap``) becomes our operator's attributes; an argument
that is not understood is refused by name. Before export the bridged module is run against the untouched one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from pe_onnx.contract import Target
from pe_onnx.errors import CheckpointError, PeOnnxError
from pe_onnx.models import checkpoint
from pe_onnx.models.attention import CompactStep, LayerCache, MaskedStep, cached_step
from pe_onnx.models.exportable import Exportable
from pe_onnx.models.rotation import Rotation, prove_rotation

IMPLEMENTATION = "pe_onnx"
PROOF_TOLERANCE = 1e-4
"""Of the logits' spread, float32: far above rounding, far below any lost window, scale or position."""

IRRELEVANT = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache_position", "output_attentions", "is_causal"}
)
"""Arguments of the attention interface that change nothing in a causal decoder at inference."""


class BridgeCache(Cache):
    """Hands new keys and values back as they are, and remembers which layer they belong to."""

    def __init__(self, step: CompactStep | MaskedStep) -> None:
        super().__init__(layers=[])
        self.step = step
        self.layer = -1
        self.windows: set[int] = set()
        """What the layers handed to attention."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> LayerCache:
        self.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.step.past[0][0].shape[2]


_active: list[BridgeCache] = []


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[B, H, T, D]`` and twice ``[B, K, T, D]`` to ``[B, T, H, D]``."""
    unknown = [name for name, x in others.items() if x is not None and x is not False and name not in IRRELEVANT]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown or others.get("is_causal") is False:
        raise CheckpointError(
            f"{type(module).__name__} hands {', '.join(unknown) or 'is_causal=False'} to its attention, which cannot "
            f"be exported exactly"
        )
    if not _active:
        raise CheckpointError(f"{type(module).__name__} was called outside an export")
    cache = _active[-1]
    (_, H, _, D), K = query.shape, key.shape[1]
    if value.shape[-1] != D:
        raise CheckpointError(f"{type(module).__name__}: value heads of {value.shape[-1]} channels, keys of {D}")

    window = -1 if sliding_window is None else int(sliding_window)
    cache.windows.add(window)

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    output = cache.step.attend(
        cache.layer,
        packed(query),
        packed(key),
        packed(value),
        num_heads=H,
        kv_heads=K,
        scale=D**-0.5 if scaling is None else float(scaling),
        softcap=float(softcap or 0.0),
        window=window,
    )
    return output.unflatten(-1, (H, D)), None


class BridgedDecoder(nn.Module):
    """A transformers causal LM behind the graph contract."""

    def __init__(self, model: PreTrainedModel, target: Target, last_only: bool, rotation: Rotation | None) -> None:
        super().__init__()
        self.model = model
        self.target = target
        self.last_only = last_only
        self.rotation = rotation
        self.windows: set[int] = set()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[LayerCache],
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        step = cached_step(self.target, attention_mask, input_ids.shape[1], past_key_values)
        with self._replaced(step) as cache:
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).logits
        if any(present is past_key_values[0] for present in step.presents):
            name = type(self.model).__name__
            raise CheckpointError(f"{name}: not every layer's attention goes through transformers' attention interface")
        return logits.float(), step.presents

    @contextmanager
    def _replaced(self, step: CompactStep | MaskedStep) -> Iterator[BridgeCache]:
        """Our attention, cache and rotation in place of transformers', and the head on the last token only."""
        config = self.model.config
        before = config._attn_implementation
        hooks = []
        if self.last_only:
            head = self.model.get_output_embeddings()
            hooks.append(head.register_forward_pre_hook(lambda _, args: (step.last_token(args[0]), *args[1:])))
        if self.rotation is not None:
            self.rotation.install()
        cache = BridgeCache(step)
        _active.append(cache)
        config._attn_implementation = IMPLEMENTATION
        try:
            yield cache
            self.windows = cache.windows
        finally:
            config._attn_implementation = before
            _active.pop()
            if self.rotation is not None:
                self.rotation.remove()
            for hook in hooks:
                hook.remove()


def from_checkpoint(path: Path, target: Target, last_only: bool) -> Exportable:
    """Bridge the checkpoint at ``path``, a Hugging Face folder or a GGUF file.

    Raises CheckpointError for weights that are missing or truncated, for a model or configuration that is not
    understood, and where the bridged module does not compute what transformers computes.
    """
    loaded = checkpoint.load(path)
    AttentionInterface.register(IMPLEMENTATION, attend)
    model = loaded.model
    rotation = prove_rotation(model)
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    module = BridgedDecoder(model, target, last_only, rotation).eval()
    exportable = Exportable(
        module=module,
        layers=text.num_hidden_layers,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=text.vocab_size,
        encoding=loaded.encoding,
        parameters=loaded.parameters,
        source={"kind": "checkpoint", "path": str(path.resolve()), "model_type": text.model_type},
        trained_length=getattr(text, "max_position_embeddings", None),
        max_length=loaded.max_length,
        config=loaded.config_json,
        generation_config=loaded.generation_config_json,
        tokenizer=loaded.tokenizer,
        write_assets=loaded.write_assets,
    )
    _prove(exportable, model)
    return exportable


@torch.no_grad()
def _prove(exportable: Exportable, model: PreTrainedModel) -> None:
    """Run the bridged module, whole and cached, against the untouched model on random tokens."""
    E = exportable
    generator = torch.Generator().manual_seed(0)
    T = min(24, E.max_length or 24)
    ids = torch.randint(0, E.vocab_size, (1, T), generator=generator)
    positions = torch.arange(T)[None]
    name = type(model).__name__
    past = [(torch.zeros(1, E.kv_heads, 0, E.head_size),) * 2 for _ in range(E.layers)]
    try:
        expected = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0].float()
        errors = []
        for begin, end in ((0, T - 1), (T - 1, T)):
            mask = torch.ones(1, end, dtype=torch.int64)
            logits, past = E.module(ids[:, begin:end], mask, positions[:, begin:end], past)
            errors.append(float((logits[0, -1] - expected[end - 1]).abs().max() / expected.std()))
    except PeOnnxError:
        raise
    except Exception as failure:
        reason = str(failure).strip().split("\n", 1)[0]
        raise CheckpointError(f"{name} cannot be exported exactly: it fails on {T} tokens: {reason}") from failure
    if not max(errors) <= PROOF_TOLERANCE:
        raise CheckpointError(
            f"{name} cannot be exported exactly: with the attention replaced its logits are off by {max(errors):.1e} "
            f"of their spread"
        )
    assert isinstance(E.module, BridgedDecoder)
    _check_windows(model, E.module.windows)


def _check_windows(model: PreTrainedModel, handed: set[int]) -> None:
    """Refuse a window or chunk that lives in transformers' mask alone: the proof may be too short to see it."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    if window is not None and used and window not in handed:
        raise CheckpointError(
            f"{type(model).__name__}: sliding_window = {window} does not reach the attention, only the mask; it cannot "
            f"be exported exactly"
        )
    if "chunked_attention" in kinds:
        chunk = getattr(config, "attention_chunk_size", None)
        raise CheckpointError(f"{type(model).__name__}: attention_chunk_size = {chunk} is not supported yet")
