"""PyTorch as a contestant: a bundle's own reference, eager, with its cache, one token at a time.

Our own decoder by the plain formulas; of a checkpoint transformers' own model, with the attention that transformers
takes by itself (``sdpa`` where the model has it) and its own DynamicCache. That is what a user has without a bundle.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pe_onnx import trained_weights
from pe_onnx.bundle import Bundle
from pe_onnx.contestants import STEP_TOKEN, Contestant, FirstToken, random_tokens
from pe_onnx.errors import CheckpointError, ConfigError, needs

with needs("comparing with PyTorch", "'pe-onnx[export]'"):
    import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

SEEDED_TOKENS = 8
"""A cache of any depth is made of this many tokens' keys and values, repeated: what a step costs does not depend on
them."""


def eager(bundle: Bundle, reference: Any, name: str, threads: int, source: list[int] | None) -> Contestant:
    """The contestant of the bundle's reference, or of another one.

    reference: None for the one that the manifest names, or a checkpoint's path, or a model of transformers of the
    bundle's kind. A checkpoint gets the ``rope_scaling`` that the bundle was exported with. threads: PyTorch's, for
    this process from now on; 0 leaves them. source: of an encoder-decoder. Raises CheckpointError where the reference
    is not to be had, ConfigError for one that is no such model.
    """
    begin = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    kind = bundle.manifest["source"]["kind"]
    if reference is None and kind == "encoding":
        trained_weights.check_unchanged(bundle.manifest["source"])
        decoder = Decoder(DecoderConfig.from_dict(bundle.manifest["source"]["config"]))
        return PlainContestant(decoder, name, time.perf_counter() - begin)
    if reference is None and kind != "checkpoint":
        raise CheckpointError(
            "the bundle was exported from a module, which has no reference with a cache to compare with"
        )
    named = reference is None or isinstance(reference, str | Path)
    model = _checkpoint(bundle, reference) if named else reference
    _require_cached(model, bundle)
    load_s = time.perf_counter() - begin
    if bundle.crossing is not None:
        return Seq2SeqContestant(model, name, load_s, source or [STEP_TOKEN], bundle.start_token or 0)
    return TransformersContestant(model, name, load_s)


def _require_cached(model: Any, bundle: Bundle) -> None:
    """Raises ConfigError for what is no model of transformers, which alone has a cache that is known here, or one of
    the other kind."""
    with needs("a model of transformers", "'pe-onnx[export]'"):
        from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"reference = {type(model).__name__}: to compare with torch, it must be a checkpoint's path or a model of "
            "transformers, whose cache is known"
        )
    crossed = bundle.crossing is not None
    if model.config.is_encoder_decoder != crossed:
        kinds = ("an encoder-decoder", "a decoder")
        of, other = kinds if crossed else reversed(kinds)
        raise ConfigError(f"reference = {type(model).__name__} is {other}, the bundle is of {of}")


def _checkpoint(bundle: Bundle, reference: str | Path | None) -> Any:
    from pe_onnx.exporter import silenced

    with needs("a checkpoint", "'pe-onnx[export]'"):
        from pe_onnx.models.checkpoint import load_model, resolve

    recorded = bundle.manifest["source"]
    path = Path(recorded["path"] if reference is None else reference)
    if not path.exists():
        what = "the bundle's checkpoint" if reference is None else "reference"
        raise CheckpointError(f"{what} {path} is gone; name it with --reference")
    with silenced():
        config = resolve(path, recorded.get("rope_scaling"))[0] if bundle.crossing is None else None
        with suppress(CheckpointError):  # not every model has it
            return load_model(path, "sdpa", config)
        return load_model(path, config=config)


class PlainContestant:
    """Our own decoder; its cache is a new tensor of one token more at each step."""

    def __init__(self, decoder: Decoder, name: str, load_s: float) -> None:
        self.decoder, self.name, self.load_s = decoder.eval(), name, load_s

    @torch.no_grad()
    def begin(self, depth_tokens: int) -> None:
        few = min(SEEDED_TOKENS, depth_tokens)
        _, presents = self._run(random_tokens(few, self.decoder.config.vocab_size), 0, ())
        self.past = [(_repeated(k, depth_tokens), _repeated(v, depth_tokens)) for k, v in presents]
        self.depth = depth_tokens

    @torch.no_grad()
    def step(self) -> None:
        self._run([STEP_TOKEN], self.depth, self.past)[0].numpy()

    @torch.no_grad()
    def first_token(self, prompt: list[int]) -> FirstToken:
        begin = time.perf_counter()
        logits, _ = self._run(prompt, 0, ())
        ran = time.perf_counter()
        int(logits[0, -1].argmax())
        return FirstToken(time.perf_counter() - begin, ran - begin)

    def _run(self, tokens: list[int], start: int, past: Any) -> tuple[torch.Tensor, Any]:
        """Logits ``[1, 1, V]`` of the last token, and the cache's new keys and values."""
        ids = torch.tensor([tokens])
        step = PlainStep(torch.ones(1, start + len(tokens), dtype=torch.int64), past=past)
        positions = torch.arange(start, start + len(tokens))[None]
        return self.decoder(ids, positions, step, last_only=True), step.presents


class TransformersContestant:
    """A decoder of transformers and its DynamicCache."""

    def __init__(self, model: Any, name: str, load_s: float) -> None:
        self.model, self.name, self.load_s = model.eval(), name, load_s
        keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if keeps_last else {}

    @torch.no_grad()
    def begin(self, depth_tokens: int) -> None:
        self.cache = self._empty()
        self._run(random_tokens(min(SEEDED_TOKENS, depth_tokens), self.model.config.vocab_size), self.cache)
        self._restore = _deepened(self.cache, depth_tokens)

    @torch.no_grad()
    def step(self) -> None:
        self._restore()
        self._run([STEP_TOKEN], self.cache)[0, -1].numpy()

    @torch.no_grad()
    def first_token(self, prompt: list[int]) -> FirstToken:
        begin = time.perf_counter()
        cache = self._empty()
        made = time.perf_counter()
        logits = self._run(prompt, cache)
        ran = time.perf_counter()
        int(logits[0, -1].argmax())
        return FirstToken(time.perf_counter() - begin, ran - made)

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def _run(self, tokens: list[int], cache: Any) -> torch.Tensor:
        """Logits ``[1, T or 1, V]``: of the last token alone where the model can leave out the others, as in use."""
        ids = torch.tensor([tokens])
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.options).logits.float()


class Seq2SeqContestant:
    """An encoder-decoder of transformers and its EncoderDecoderCache; prompts are sources."""

    def __init__(self, model: Any, name: str, load_s: float, source: list[int], start: int) -> None:
        self.model, self.name, self.load_s = model.eval(), name, load_s
        self.source, self.start = source, start

    @torch.no_grad()
    def begin(self, depth_tokens: int) -> None:
        self.hidden, self.cache = self._encoded(self.source), self._empty()
        few = min(SEEDED_TOKENS, depth_tokens)
        self._run(random_tokens(few, self.model.config.vocab_size), self.hidden, self.cache)
        self._restore = _deepened(self.cache.self_attention_cache, depth_tokens)

    @torch.no_grad()
    def step(self) -> None:
        self._restore()
        self._run([STEP_TOKEN], self.hidden, self.cache).numpy()

    @torch.no_grad()
    def first_token(self, prompt: list[int]) -> FirstToken:
        begin = time.perf_counter()
        logits = self._run([self.start], self._encoded(prompt), self._empty())
        ran = time.perf_counter()
        int(logits.argmax())
        return FirstToken(time.perf_counter() - begin, ran - begin)

    def _encoded(self, source: list[int]) -> Any:
        return self.model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state

    def _empty(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _run(self, tokens: list[int], hidden: Any, cache: Any) -> torch.Tensor:
        output = self.model(
            encoder_outputs=(hidden,), decoder_input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True
        )
        return output.logits[0, -1].float()


def _deepened(cache: Any, tokens: int) -> Callable[[], None]:
    """Repeat what a cache of transformers holds to ``tokens`` tokens; a function that puts it back after a step."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = [(_repeated(layer.keys, tokens), _repeated(layer.values, tokens)) for layer in layers]

    def restore() -> None:
        for layer, (keys, values) in zip(layers, held, strict=True):
            layer.keys, layer.values = keys, values

    restore()
    return restore


def _repeated(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[B, K, few, D]`` to ``[B, K, tokens, D]``."""
    times = -(-tokens // x.shape[2])
    return x.repeat(1, 1, times, 1)[:, :, :tokens].contiguous()
