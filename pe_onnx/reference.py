"""PyTorch's side of a parity check: eager, in float32, all tokens at once, no cache and none of the export's steps.

Where an encoding is path dependent the logits are a matter of the chunks too: then with a cache, chunk by chunk.

For our own decoder the encodings' operators are the same PyTorch formulas; these are held against independent ones in
``tests/test_op_*.py``. For a checkpoint nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_onnx.errors import CheckpointError, needs

with needs("parity", "'pe-onnx[export]'"):
    import torch

from pe_onnx import trained_weights
from pe_onnx.config import DecoderConfig
from pe_onnx.contract import CacheShape
from pe_onnx.models.attention import LayerCache, PlainStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder
from pe_onnx.rounded_module import Hold, as_it_is, of_caller

if TYPE_CHECKING:
    from pe_onnx.kv_cache import Path as RunPath
    from pe_onnx.parity import PathReference, Reference

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def from_manifest(manifest: Mapping[str, Any], hold: Hold = as_it_is) -> tuple[Reference | PathReference, str]:
    """The reference that a bundle's manifest names. hold: gives its module other weights. Raises CheckpointError where
    it is not to be had."""
    source = manifest["source"]
    if source["kind"] == "encoding":
        trained_weights.check_unchanged(source)
        config = DecoderConfig.from_dict(source["config"])
        decoder, name = hold(Decoder(config)), f"PyTorch, {config.encoding} decoder, {_weights(config)}"
        if decoder.encoding.path_dependent:
            return CachedReference(lambda: plain_with_cache(decoder)), f"{name}, run by run"
        return from_module(PlainDecoder(decoder)), name
    if source["kind"] == "checkpoint":
        path = Path(source["path"])
        if not path.exists():
            raise CheckpointError(f"the bundle's checkpoint {path} is gone; name it with --reference")
        scaling = source.get("rope_scaling")
        return from_checkpoint(path, scaling, hold), f"transformers, {path}{_scaled(scaling)}"
    raise CheckpointError(f"the bundle was exported from a module, {source['class']}; hand it in as the reference")


def _weights(config: DecoderConfig) -> str:
    return f"seed {config.seed}" if config.weights is None else f"weights trained with {config.weights}"


def from_checkpoint(
    path: Path, scaling: Mapping[str, Any] | None = None, hold: Hold = as_it_is
) -> Reference | PathReference:
    """transformers' own model with its own attention, and its own cache where frequencies switch.

    scaling: the ``--rope-scaling`` that the bundle was exported with. hold: gives the model other weights.
    """
    from pe_onnx.exporter import silenced

    with needs("a checkpoint", "'pe-onnx[export]'"):
        from transformers import DynamicCache

        from pe_onnx.models import switches
        from pe_onnx.models.bridge import takes_positions, untouched_attention
        from pe_onnx.models.checkpoint import load_model, resolve
        from pe_onnx.models.observed import observe

    with silenced():
        model = hold(load_model(path, config=resolve(path, scaling)[0]))
        model.config._attn_implementation = untouched_attention(model)
    if not switches.thresholds(model):
        takes = takes_positions(model)
        first = observe(model, takes).first  # some families count from another number than 0

        def forward(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> Any:
            named = {"position_ids": positions + first} if takes else {}
            return model(input_ids=ids, attention_mask=mask, **named)

        return from_module(forward)

    def start() -> Forward:
        cache = DynamicCache()
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)  # forgets the longest text it has seen
        return lambda ids, mask, positions: (
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        )

    return CachedReference(start)


def _scaled(scaling: Mapping[str, Any] | None) -> str:
    return " with " + ", ".join(f"{key} {value}" for key, value in scaling.items()) if scaling else ""


def from_module(module: Any) -> Reference:
    """``module(input_ids, attention_mask, position_ids)`` to logits ``[B, T, V]``, or an output that has them."""

    @torch.no_grad()
    def compute(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tokens = torch.from_numpy(ids)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        output = module(tokens, torch.ones_like(tokens), positions)
        return getattr(output, "logits", output).float().numpy()

    return compute


def follows_contract(value: object) -> bool:
    """Whether it is a module that was, or could be, exported as it is: called with keys and values."""
    return isinstance(value, torch.nn.Module) and "past_key_values" in signature(value.forward).parameters


def of_contract(module: Any, caches: Sequence[CacheShape]) -> Reference:
    """A module that follows the graph contract, run token by token with a cache of its own."""

    @torch.no_grad()
    def compute(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        past = [(torch.zeros(len(ids), K, 0, D),) * 2 for K, D in caches]
        made = []
        for end in range(1, ids.shape[1] + 1):
            mask = torch.ones(len(ids), end, dtype=torch.int64)
            positions = torch.full((len(ids), 1), end - 1)
            logits, past = module(torch.from_numpy(ids[:, end - 1 : end].copy()), mask, positions, past)
            made.append(logits[:, -1:].float())
        return torch.cat(made, 1).numpy()

    return compute


class CachedReference:
    """A model with a cache, run in the chunks in which the bundle was run: for path-dependent encodings.

    start: makes an empty cache and returns ``forward(input_ids, attention_mask, position_ids)`` to the logits
    ``[B, T, V]`` of T tokens appended to it. ids and positions int64 ``[B, T]``, mask int64 ``[B, P + T]`` with zeros
    at padding, which may stand anywhere and has position 0. For transformers::

        def start():
            cache = DynamicCache()
            return lambda ids, mask, positions: model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits
    """

    def __init__(self, start: Callable[[], Forward]) -> None:
        self.start = start

    @torch.no_grad()
    def follow(self, path: RunPath) -> list[np.ndarray[Any, Any]]:
        """For each row the float32 logits ``[tokens, V]`` of all it was given."""
        rows = 1 + max(row for run in path for row in run)
        forward = self.start()
        mask = torch.zeros(rows, 0, dtype=torch.int64)
        logits: list[list[torch.Tensor]] = [[] for _ in range(rows)]
        for run in path:
            T = max(tokens.size for tokens in run.values())
            ids, valid = torch.zeros(2, rows, T, dtype=torch.int64)
            for row, tokens in run.items():
                ids[row, T - tokens.size :] = torch.from_numpy(tokens)
                valid[row, T - tokens.size :] = 1
            mask = torch.cat((mask, valid), 1)
            positions = (mask.cumsum(1)[:, -T:] - 1) * valid
            out = forward(ids, mask, positions).float()
            for row, tokens in run.items():
                logits[row].append(out[row, T - tokens.size :])
        return [torch.cat(parts).numpy() if parts else np.zeros((0, 0), np.float32) for parts in logits]


def plain_with_cache(decoder: Decoder) -> Forward:
    """Our own decoder by the plain formula; keys stay as they were rotated."""
    past: Sequence[LayerCache] = ()

    def forward(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nonlocal past
        step = PlainStep(mask, past=past)
        logits = decoder(ids, positions, step)
        past = step.presents
        return logits

    return forward


class TransformersSeq2Seq:
    """An encoder-decoder of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def encode(self, source: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int64 ``[S]`` to float32 ``[S, C]``."""
        ids = torch.from_numpy(source)[None]
        return self.model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0].float().numpy()

    @torch.no_grad()
    def decode(self, hidden: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """An encoder's output ``[S, C]`` and tokens int64 ``[1, T]`` to logits ``[1, T, V]``."""
        output = self.model(
            encoder_outputs=(torch.from_numpy(hidden)[None],),
            attention_mask=torch.ones(1, len(hidden), dtype=torch.int64),
            decoder_input_ids=torch.from_numpy(ids),
            use_cache=False,
        )
        return output.logits.float().numpy()

    @torch.no_grad()
    def beams(
        self, source: np.ndarray[Any, Any], start: int, num_beams: int, tokens: int, ends: list[int]
    ) -> tuple[list[int], float]:
        """The best hypothesis of transformers' own beam search and its score, whatever its generation_config says."""
        from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

        ids = torch.from_numpy(source)[None]
        config = GenerationConfig(
            num_beams=num_beams,
            max_new_tokens=tokens,
            do_sample=False,
            decoder_start_token_id=start,
            eos_token_id=ends or None,
            pad_token_id=start,
            return_dict_in_generate=True,
            output_scores=True,
        )
        # generate's own cache has as many layers as the encoder
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = torch.ones_like(ids)
        made = self.model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=config)
        new = made.sequences[0, 1:].tolist()
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        return new[:stop], float(made.sequences_scores[0])


def seq2seq(manifest: Mapping[str, Any], reference: Any = None, hold: Hold = as_it_is) -> tuple[Any, str]:
    """The reference of an encoder-decoder, and its name. hold: gives its model other weights.

    Raises CheckpointError where it is not to be had.
    """
    if reference is None:
        reference = Path(manifest["source"]["path"])
        if not reference.exists():
            raise CheckpointError(f"the bundle's checkpoint {reference} is gone; name it with --reference")
    if isinstance(reference, str | Path):
        from pe_onnx.exporter import silenced

        with needs("a checkpoint", "'pe-onnx[export]'"):
            from pe_onnx.models.checkpoint import load_model
        with silenced():
            return TransformersSeq2Seq(hold(load_model(Path(reference)))), f"transformers, {reference}"
    if is_module(reference):
        return TransformersSeq2Seq(of_caller(reference, hold)), type(reference).__name__
    if hasattr(reference, "encode") and hasattr(reference, "decode"):
        return reference, type(reference).__name__
    raise CheckpointError(
        f"reference = {reference!r} must be a checkpoint's path or an encoder-decoder of transformers"
    )


def is_module(value: object) -> bool:
    return isinstance(value, torch.nn.Module)
