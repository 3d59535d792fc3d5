"""What exporter.py needs of a model, wherever it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pe_onnx import trained_weights
from pe_onnx.config import DecoderConfig
from pe_onnx.contract import CacheShape, Crossing, Target
from pe_onnx.models.attention import LayerCache, PlainStep, cached_step
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.half_precision import round_weights
from pe_onnx.models.proof import Proof, of_module
from pe_onnx.models.seq2seq_proof import Seq2SeqProof


@dataclasses.dataclass
class Exportable:
    """A module that follows the graph contract, and what its manifest says of it."""

    module: nn.Module
    """``module(input_ids, attention_mask, position_ids, past_key_values)`` to logits and presents, the caches as
    lists of one (key, value) pair a layer, each ``[B, K, P, D]``. Of an encoder-decoder a module with an ``encoder``
    and a ``decoder``, see seq2seq.py."""
    caches: list[CacheShape]
    """K and D of each layer's cache."""
    vocab_size: int
    encoding: str
    parameters: dict[str, dict[str, Any]]
    """Name to {"value", "origin"}: what bears on positions, and where it was read."""
    source: dict[str, Any]
    """How to make the PyTorch reference again."""
    ignored: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of the checkpoint's configuration that transformers ignores and the user let through."""
    trained_length: int | None = None
    """Tokens the model was trained on: the cache grows up to here unless told otherwise."""
    max_length: int | None = None
    """Tokens the encoding can take at all; None where nothing limits it."""
    path_dependent: bool = False
    """Whether the logits depend on the chunks in which a text is run."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Mapping[str, Any] | None = None
    write_assets: Callable[[Path], None] = lambda folder: None
    """Writes tokenizer files into the bundle."""
    proof: Proof | Seq2SeqProof | None = None
    """What the finished bundle is to give on a few tokens; None where the module cannot be run on them."""
    layers: int | None = None
    """Layers that logits go through, where there are more than caches: an encoder's, or some that share a cache."""
    crossing: Crossing | None = None
    """What the decoder knows of its encoder; None where there is none."""
    start_token: int | None = None
    """With which the decoder of an encoder-decoder begins."""


class CachedDecoder(nn.Module):
    """Our own decoder behind the graph contract."""

    def __init__(self, decoder: Decoder, target: Target, last_only: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.target = target
        self.last_only = last_only

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[LayerCache],
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        step = cached_step(self.target, attention_mask, input_ids.shape[1], past_key_values)
        logits = self.decoder(input_ids, position_ids, step, self.last_only)
        return logits.float(), step.presents


class PlainDecoder(nn.Module):
    """Our own decoder as PyTorch's reference: ``(input_ids, attention_mask, position_ids)`` to all logits."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.decoder(input_ids, position_ids, PlainStep(attention_mask))


def from_config(
    config: DecoderConfig, target: Target, last_only: bool, preset: str | None = None, dtype: str = "fp32"
) -> Exportable:
    """Our own decoder with the encoding that the config names."""
    decoder = Decoder(config)
    round_weights(decoder, dtype)
    max_length = decoder.encoding.max_length_in(dtype)
    given = config.encoding_parameters
    digest = {} if config.weights is None else {"weights_sha256": trained_weights.digest(config.weights)}
    module = CachedDecoder(decoder, target, last_only)
    caches = [(config.kv_heads, config.head_size)] * config.num_hidden_layers
    return Exportable(
        module=module,
        caches=caches,
        vocab_size=config.vocab_size,
        encoding=config.encoding,
        parameters={
            name: {"value": value, "origin": "given" if name in given else "default"}
            for name, value in decoder.encoding.parameters_used.items()
        },
        source={"kind": "encoding", "preset": preset, "config": config.to_dict(), **digest},
        trained_length=min(config.max_position_embeddings, max_length or config.max_position_embeddings),
        max_length=max_length,
        path_dependent=decoder.encoding.path_dependent,
        config={"model_type": "pe_onnx", "architectures": ["Decoder"], **config.to_dict()},
        generation_config={},
        tokenizer={"kind": "bytes"} if config.vocab_size == 256 else None,
        proof=Proof(
            [(K, D, D) for K, D in caches],
            config.vocab_size,
            of_module(module, caches, torch.float32),
            reaches=[config.max_position_embeddings] if decoder.encoding.path_dependent else [],  # no switch beyond
            limit=max_length,
            alone=decoder.encoding.path_dependent,
        ),
    )
