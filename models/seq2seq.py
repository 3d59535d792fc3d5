"""The bridge for encoder-decoders of the T5 kind: transformers' encoder and decoder as they are, behind two graphs.

Replaced are the attention kernels, the cache and the relative bias (``models/families/t5.py``). The decoder's cross
attention keeps the keys and values of a request's first run (``custom_ops/cross_attention.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from pe_onnx.contract import CacheShape, Crossing, Target
from pe_onnx.errors import CheckpointError
from pe_onnx.models import checkpoint
from pe_onnx.models.across import CrossStep, EncoderStep
from pe_onnx.models.attention import LayerCache, cached_step
from pe_onnx.models.bridge import described, family, named_failures, replaced
from pe_onnx.models.exportable import Exportable
from pe_onnx.models.half_precision import round_weights
from pe_onnx.models.interface import BridgeCache, register
from pe_onnx.models.norms import prove_norms
from pe_onnx.models.seq2seq_proof import CrossedCache, Seq2SeqProof
from pe_onnx.models.substitution import Substitution
from pe_onnx.tolerance import PROOF, tolerance_for

PADDED = 16
"""The fused attention wants head sizes in multiples of it."""


class BridgedEncoder(nn.Module):
    """``(input_ids, attention_mask)``, int64 ``[B, S]``, to the last hidden state ``[B, S, C]``."""

    def __init__(self, model: PreTrainedModel, substitutions: list[Substitution]) -> None:
        super().__init__()
        self.encoder = model.get_encoder()
        self.substitutions = substitutions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with replaced(self.encoder, EncoderStep(attention_mask), self.substitutions):
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class BridgedSeq2SeqDecoder(nn.Module):
    """The decoder and its head, behind the graph contract of an encoder-decoder."""

    def __init__(
        self,
        model: PreTrainedModel,
        target: Target,
        last_only: bool,
        substitutions: list[Substitution],
        caches: list[CacheShape],
    ) -> None:
        super().__init__()
        self.model = _without_encoder(model)
        self.target = target
        self.last_only = last_only
        self.substitutions = substitutions
        self.caches = caches

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past_key_values: list[CrossedCache],
    ) -> tuple[torch.Tensor, list[CrossedCache]]:
        step = cached_step(self.target, attention_mask, input_ids.shape[1], [layer[:2] for layer in past_key_values])
        across = CrossStep(encoder_hidden_states, encoder_attention_mask, [layer[2:] for layer in past_key_values])
        cache = BridgeCache(step, self.caches, across)
        with replaced(self.model, cache, self.substitutions, step.last_token if self.last_only else None):
            logits = self.model(
                encoder_outputs=(encoder_hidden_states,),
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids,
                decoder_attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
            ).logits
        if any(present is step.past[0] for present in step.presents) or None in across.presents:
            raise CheckpointError("not every layer's attention goes through transformers' attention interface")
        presents = [(*own, *other) for own, other in zip(step.presents, across.presents, strict=True) if other]
        return logits.float(), presents


class Bridged(nn.Module):
    """Both halves over one set of weights."""

    def __init__(self, encoder: BridgedEncoder, decoder: BridgedSeq2SeqDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.layers = encoder.encoder.config.num_hidden_layers + len(decoder.caches)


def _without_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules but the encoder, so that its weights are no part of the decoder's graph."""
    shell = copy.copy(model)
    encoder = model.get_encoder()
    shell.__dict__["_modules"] = {name: part for name, part in model.named_children() if part is not encoder}
    return shell


def from_checkpoint(
    path: Path, target: Target, last_only: bool, follow: bool = False, dtype: str = "fp32"
) -> Exportable:
    """Bridge the checkpoint at ``path``, a Hugging Face folder of an encoder-decoder.

    Raises CheckpointError for what is missing or not understood, and where the bridged module does not compute what
    transformers computes.
    """
    loaded = checkpoint.load(path, None, follow)
    model = loaded.model
    round_weights(model, dtype)
    module, crossing, proof = bridge(model, target, last_only)
    names = ("decoder_start_token_id", "bos_token_id")  # in transformers' order
    start = next((x for name in names if (x := getattr(model.generation_config, name, None)) is not None), None)
    return Exportable(
        module=module,
        caches=module.decoder.caches,
        layers=module.layers,
        proof=proof,
        crossing=crossing,
        start_token=start if isinstance(start, int) else None,
        **described(loaded, path),
    )


def bridge(model: PreTrainedModel, target: Target, last_only: bool) -> tuple[Bridged, Crossing, Seq2SeqProof]:
    """A model behind two graphs, proven against itself. Raises CheckpointError with the reason."""
    register()
    own = family(model)
    if own is None or not getattr(own, "SEQ2SEQ", False):
        raise CheckpointError(f"{type(model).__name__} is an encoder-decoder without a file in models/families")
    for part in (model, model.get_encoder(), model.get_decoder()):
        part.config._attn_implementation = "eager"
    width, shapes, crossed = observe(model)
    caches = [(K, -(-D // PADDED) * PADDED if target == "ort" else D) for K, D in shapes]
    substitutions = [*prove_norms(model), *own.substitutions(model)]
    module = Bridged(
        BridgedEncoder(model, substitutions),
        BridgedSeq2SeqDecoder(model, target, last_only, substitutions, caches),
    ).eval()
    proof = Seq2SeqProof(
        shapes,
        crossed,
        model.config.vocab_size,
        lambda source: untouched_encoder(model, source),
        lambda hidden, row, prompt, past: untouched_decoder(model, hidden, row, prompt, past),
        reaches=[own.reach(model)],
    )
    with named_failures(model), torch.no_grad():
        error = proof.error(module.encoder, module.decoder, target, caches, torch.float32)
    if not error <= PROOF * tolerance_for("fp32", module.layers).error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be exported exactly: with its attention replaced it is off by {error:.1e} "
            f"of the spread"
        )
    return module, Crossing(width, tuple(crossed)), proof


@torch.no_grad()
def observe(model: PreTrainedModel) -> tuple[int, list[CacheShape], list[CacheShape]]:
    """The width of the encoder's output, and K and D of each layer's own and cross cache, of a run as it is.

    Raises CheckpointError where keys and values differ in size.
    """
    source, target = torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    hidden = untouched_encoder(model, source[0])
    model(
        encoder_outputs=(hidden[None],),
        attention_mask=source,
        decoder_input_ids=target,
        past_key_values=cache,
        use_cache=True,
    )
    shapes = []
    for part, length in ((cache.self_attention_cache, 3), (cache.cross_attention_cache, 5)):
        pairs = [(layer.keys, layer.values) for layer in part.layers]
        if any(key.shape != value.shape or key.shape[2] != length for key, value in pairs):
            raise CheckpointError(f"{type(model).__name__} does not cache one key and one value for each token")
        shapes.append([(key.shape[1], key.shape[3]) for key, _ in pairs])
    return hidden.shape[-1], shapes[0], shapes[1]


@torch.no_grad()
def untouched_encoder(model: PreTrainedModel, source: torch.Tensor) -> torch.Tensor:
    """transformers' own encoder on one source ``[S]``, to ``[S, C]``."""
    return model.get_encoder()(input_ids=source[None], attention_mask=torch.ones_like(source)[None])[0][0]


@torch.no_grad()
def untouched_decoder(
    model: PreTrainedModel, hidden: torch.Tensor, row: torch.Tensor, ends: Sequence[int], past: list[LayerCache]
) -> list[torch.Tensor]:
    """transformers' own cached decode of one row over an encoder's output ``[S, C]``, in runs that end at ``ends``."""
    own = DynamicCache()
    for layer, (key, value) in enumerate(past):
        own.update(key, value, layer)
    cache = EncoderDecoderCache(own, DynamicCache())
    begin, before, result = 0, past[0][0].shape[2] if past else 0, []
    for end in ends:
        logits = model(
            encoder_outputs=(hidden[None],),
            attention_mask=torch.ones(1, len(hidden), dtype=torch.int64),
            decoder_input_ids=row[None, begin:end],
            decoder_attention_mask=torch.ones(1, before + end, dtype=torch.int64),
            past_key_values=cache,
            use_cache=True,
        ).logits
        result.append(logits[0].float())
        begin = end
    return result
