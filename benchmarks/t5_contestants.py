"""Who decodes in ``t5.py``: our T5, the same with RoPE, transformers itself, and a graph of PyTorch's own exporter.

All are handed the same past, keys and values of their own tokens and of a source, and give the logits of one more
token. Each keeps its cache as its user would: ours in place, transformers in an EncoderDecoderCache, the stock graph as
OrtValues that go in as past and come out as present, bound and never through numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

import pe_onnx
from pe_onnx.contract import DTYPES
from pe_onnx.exporter import silenced
from pe_onnx.kv_cache import InPlaceCache
from pe_onnx.models import seq2seq
from pe_onnx.models.exportable import Exportable
from pe_onnx.models.interface import attend, current
from pe_onnx.models.parts import parts
from pe_onnx.models.substitution import Substitution
from pe_onnx.tracing import to_onnx
from pe_onnx.writing import write

Array = np.ndarray[Any, Any]

SMALL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "decoder_start_token_id": 0,
}
"""t5-small's configuration."""
THETA = 10000.0
STOCK = "decoder_with_past_model.onnx"
OPSET = 20


@dataclass
class Past:
    """What a decode step finds: for each layer keys and values of the decoder's tokens, and of the source."""

    source: list[int]
    hidden: Array
    """The encoder's output ``[1, E, C]``."""
    own: list[Array]
    """float32 ``[1, H, P, D]``: k0, v0, k1, v1, ..."""
    across: list[Array]
    """float32 ``[1, H, E, D]``."""

    @property
    def tokens(self) -> int:
        return self.own[0].shape[2]

    def random(self, tokens: int, rng: np.random.Generator) -> Past:
        """Over the same source, ``tokens`` others of its own: what a step costs does not depend on their values."""
        _, H, _, D = self.own[0].shape
        own = [0.5 * rng.standard_normal((1, H, tokens, D), np.float32) for _ in self.own]
        return Past(self.source, self.hidden, own, self.across)


class Contestant(Protocol):
    def begin(self, past: Past) -> None:
        """Take over a past; every step continues it."""
        ...

    def step(self, token: int) -> Array:
        """Logits float32 ``[V]``, valid until the next step."""
        ...


@torch.no_grad()
def small_model(**changes: Any) -> T5ForConditionalGeneration:
    """Random weights, drawn so that scores have a standard deviation of 2 and biases of 1.5."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**{**SMALL, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(std=1.5)
        elif name.endswith((".q.weight", ".k.weight")):
            parameter.normal_(std=(2 / model.config.d_kv**0.5 / parameter.shape[-1]) ** 0.5)
    return model


class Ours:
    """A bundle in our runtime."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.model = pe_onnx.load(folder, threads=threads, verify=False)

    def begin(self, past: Past) -> None:
        """The source runs through our own encoder and cross attention; the decoder's own cache is put in place."""
        cache = self.model.cache(1, past.tokens + 8, sources=[past.source])
        assert isinstance(cache, InPlaceCache)
        cache.prefill([[0]])
        cache.reserve(past.tokens + 1)
        for buffer, values in zip(cache.buffers, past.own, strict=True):
            buffer.host[:, :, : past.tokens] = values
            buffer.upload()
        self.cache, self.tokens = cache, past.tokens

    def step(self, token: int) -> Array:
        self.cache.lengths[:] = self.tokens
        return self.cache.decode([token])[0]


class Eager:
    """transformers, with the attention that it takes by itself."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        self.model = model

    def begin(self, past: Past) -> None:
        self.hidden = torch.from_numpy(past.hidden)
        self.cache = EncoderDecoderCache(_dynamic(past.own), _dynamic(past.across))
        self.held = [(layer.keys, layer.values) for layer in self.cache.self_attention_cache.layers]

    def step(self, token: int) -> Array:
        """The update of its cache, a new tensor of one token more, is part of its step."""
        for layer, (key, value) in zip(self.cache.self_attention_cache.layers, self.held, strict=True):
            layer.keys, layer.values = key, value
        return self.run([token], self.cache)[-1]

    @torch.no_grad()
    def run(self, tokens: list[int], cache: EncoderDecoderCache) -> Array:
        """``[T, V]``."""
        output = self.model(
            encoder_outputs=(self.hidden,), decoder_input_ids=torch.tensor([tokens]), past_key_values=cache
        )
        return output.logits[0].numpy()

    @torch.no_grad()
    def past_of(self, source: list[int], tokens: list[int]) -> Past:
        """What transformers itself has cached after some tokens."""
        self.hidden = self.model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.run(tokens, cache)
        own, across = (
            [x.numpy() for layer in part.layers for x in (layer.keys, layer.values)]
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
        )
        return Past(source, self.hidden.numpy(), own, across)


class Stock:
    """The decoder as PyTorch's exporter makes it, in onnxruntime."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(folder / STOCK), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()

    def begin(self, past: Past) -> None:
        names = [value.name for value in self.session.get_inputs()]
        values = [np.zeros((1, 1), np.int64), past.hidden, *past.own, *past.across]
        self.inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in zip(names, values, strict=True)}

    def step(self, token: int) -> Array:
        self.inputs["input_ids"].update_inplace(np.array([[token]]))
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name, "cpu")
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0].numpy()[0, 0]


def _dynamic(arrays: list[Array]) -> DynamicCache:
    tensors = [torch.from_numpy(x) for x in arrays]
    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


class WithPast(nn.Module):
    """transformers' decoder as exporters wrap it: caches are made of the inputs, and taken apart for the outputs."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past: list[list[torch.Tensor]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        own, across = (DynamicCache(list(zip(part[::2], part[1::2], strict=True))) for part in past)
        cache = EncoderDecoderCache(own, across)
        logits = self.model(
            encoder_outputs=(encoder_hidden_states,), decoder_input_ids=input_ids, past_key_values=cache
        ).logits
        return logits, [x for layer in own.layers for x in (layer.keys, layer.values)]


def export_stock(model: T5ForConditionalGeneration, folder: Path) -> None:
    """By ``torch.onnx.export`` alone, with every length dynamic."""
    config, free = model.config, torch.export.Dim.DYNAMIC
    tensors, layers = 2 * config.num_decoder_layers, range(config.num_decoder_layers)
    past = [[torch.zeros(1, config.num_heads, n, config.d_kv) for _ in range(tensors)] for n in (5, 7)]
    args = (torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 7, config.d_model), past)
    named = [f"{i}.{kind}" for i in layers for kind in ("key", "value")]
    folder.mkdir(parents=True)
    with silenced(), torch.no_grad():
        torch.onnx.export(
            WithPast(model),
            args,
            folder / STOCK,
            input_names=[
                "input_ids",
                "encoder_hidden_states",
                *(f"past_key_values.{part}.{name}" for part in ("decoder", "encoder") for name in named),
            ],
            output_names=["logits", *(f"present.decoder.{name}" for name in named)],
            dynamic_shapes=({}, {1: free}, [[{2: free}] * tensors] * 2),
            opset_version=OPSET,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def export_rotated(checkpoint: Path, output: Path, logits: str = "last") -> None:
    """The bundle that ``pe_onnx.export`` makes of a T5, with RoPE in place of its decoder's relative bias."""
    with silenced():
        exportable: Exportable = seq2seq.from_checkpoint(checkpoint, "ort", logits == "last")
        decoder: Any = exportable.module.decoder
        for block in decoder.model.get_decoder().block:
            attention = block.layer[0].SelfAttention
            decoder.substitutions.append(Substitution(attention, "forward", _rotating(attention)))
        exportable.encoding, exportable.proof = "rope", None
        exportable.parameters = {"theta": {"value": THETA, "origin": "benchmarks/t5_contestants.py"}}
        graphs = parts(exportable, getattr(torch, DTYPES["fp32"]), logits)
        models = {part.file: to_onnx(part, None, "ort", "fp32") for part in graphs}
        write(models, exportable, output, "ort", "fp32", logits, False, False, lambda stage: None)


def _rotating(module: Any) -> Callable[..., Any]:
    """T5's self-attention with rotated queries and keys; the tables go from layer to layer in the bias's place."""
    from pe_onnx.config import DecoderConfig
    from pe_onnx.encodings.rope import Rope

    H, D = module.n_heads, module.key_value_proj_dim
    rope = Rope(DecoderConfig(encoding="rope", hidden_size=H * D, num_attention_heads=H), theta=THETA)

    def forward(
        hidden: torch.Tensor, mask: Any = None, position_bias: Any = None, past_key_values: Any = None, **others: Any
    ) -> tuple[torch.Tensor, Any, None]:
        tables = position_bias or rope.tables(current().step.query_positions)
        query, key = rope.rotate(module.q(hidden), module.k(hidden), tables)  # [B, T, H*D]
        q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (query, key, module.v(hidden)))
        k, v = past_key_values.update(k, v, module.layer_idx)
        output, _ = attend(module, q, k, v, mask, scaling=1.0)
        return module.o(output.flatten(2)), tables, None

    return forward
