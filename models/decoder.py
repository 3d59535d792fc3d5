"""Our own decoder: any of the usual architectures by configuration, with any positional encoding.

It knows no encoding by name: an encoding adds to the embedding, rotates queries and keys, or adds to the scores
(``pe_onnx/encoding.py``). Weights are random but drawn so that positions matter: scores of order 1 and biases of the
same order, where the usual std of 0.02 would leave softmax uniform and hide a wrong encoding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from pe_onnx import trained_weights
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding, Tables, build_encoding, encoding_class
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import Step

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


_KIND = {
    "none": "decoder without positions",
    "embed": "vector on the embedding",
    "rotate": "rotation of queries and keys",
    "bias": "bias on the scores",
    "layer": "mix of encodings by layer",
}


def make_norm(config: DecoderConfig) -> nn.Module:
    kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return kinds[config.norm](config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        C, D = config.hidden_size, config.head_size
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, config.kv_heads * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, config.kv_heads * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=config.output_bias)

    def forward(
        self,
        x: torch.Tensor,
        encoding: PositionalEncoding,
        step: Step,
        tables: Tables | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        H, K = self.config.num_attention_heads, self.config.kv_heads
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, H*D], [B, T, K*D] twice
        if tables is not None:
            q, k = encoding.rotate(q, k, tables)
        output = step.attend(
            self.layer,
            q,
            k,
            v,
            num_heads=H,
            kv_heads=K,
            scale=self.config.scale,
            bias=bias,
            softcap=self.config.attention_softcap,
        )
        return self.o_proj(output)  # [B, T, C]


class Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(C, M, bias=config.mlp_bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(C, M, bias=config.mlp_bias)
        self.down_proj = nn.Linear(M, C, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config)

    def forward(
        self,
        x: torch.Tensor,
        encoding: PositionalEncoding,
        step: Step,
        tables: Tables | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), encoding, step, tables, bias)
        if self.parallel:
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens to logits, given a step (``models/attention.py``)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoding = build_encoding(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._draw_weights()
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        if config.weights is not None:
            self._load(config.weights)
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, step: Step, last_only: bool = False
    ) -> torch.Tensor:
        """input_ids and position_ids int64 ``[B, T]``; logits ``[B, T, V]``, or ``[B, 1, V]`` for the last token."""
        x = self.embedding(input_ids) * self.config.embedding_scale  # [B, T, C]
        if self.encoding.hook == "embed":
            x = x + self.encoding.embed(position_ids).to(x.dtype)
        tables: dict[PositionalEncoding, Tables] = {}
        biases: dict[PositionalEncoding, torch.Tensor] = {}
        for i, block in enumerate(self.blocks):
            encoding = self.encoding.layer(i)
            if encoding.hook == "rotate" and encoding not in tables:
                tables[encoding] = encoding.tables(position_ids)
            if encoding.hook == "bias" and encoding not in biases:
                bias = encoding.bias(step.query_positions, step.key_positions, step.key_length)
                biases[encoding] = bias.to(x.dtype)
            x = block(x, encoding, step, tables.get(encoding), biases.get(encoding))
        if last_only:
            x = step.last_token(x)
        logits = self.head(self.norm(x))
        c = self.config.logit_softcap
        return c * torch.tanh(logits / c) if c else logits

    def _load(self, weights: str) -> None:
        """Trained ones. Raises ConfigError where they belong to another architecture, or another kind of encoding."""
        hook = encoding_class(trained_weights.config(weights)["encoding"]).hook
        if hook != self.encoding.hook:
            raise ConfigError(
                f"weights = {weights!r} were trained with a {_KIND[hook]}, and {self.config.encoding!r} is a "
                f"{_KIND[self.encoding.hook]}"
            )
        try:
            self.load_state_dict(trained_weights.read(weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"weights = {weights!r} do not fit this decoder: {reason}") from None

    def _draw_weights(self) -> None:
        """Unit-variance queries, keys and residual branches; a seed's numbers hold for a version of PyTorch."""
        generator = torch.Generator().manual_seed(self.config.seed)
        branch = (2 * self.config.num_hidden_layers) ** -0.5
        gains = {"q_proj.weight": 1.5, "k_proj.weight": 1.5, "head.weight": 3.0}
        gains |= {"o_proj.weight": branch, "down_proj.weight": branch}
        nn.init.normal_(self.embedding.weight, generator=generator)
        self.encoding.draw_weights(generator)
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding.", "encoding.")):
                continue
            if parameter.dim() == 1:
                center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                nn.init.normal_(parameter, center, 0.1, generator=generator)
            else:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                nn.init.normal_(parameter, 0.0, gain * parameter.shape[1] ** -0.5, generator=generator)
        with torch.no_grad():  # a tied head would otherwise give logits of std sqrt(C)
            if self.config.tie_word_embeddings and isinstance(self.norm.weight, torch.Tensor):
                self.norm.weight.mul_(3.0 * self.config.hidden_size**-0.5)
