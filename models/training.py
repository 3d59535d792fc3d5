"""Training of a small decoder on bytes, the same for every encoding: what ``models/train.py`` runs.

One thread and seeded draws: a machine gives the same weights again, and a run that was stopped goes on to the same
weights, from a file beside its output. Matrices inside the blocks are moved by Muon, all else by AdamW.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pe_onnx.config import DecoderConfig
from pe_onnx.encodings.sinusoidal import Sinusoidal
from pe_onnx.errors import CheckpointError, ConfigError, ExportError, system_reason
from pe_onnx.models import training_text
from pe_onnx.models.attention import Heads, PlainStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.muon import Muon
from pe_onnx.report_files import write_report
from pe_onnx.trained_weights import HELD_OUT, write

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 448,
    "max_position_embeddings": 256,
}
"""1.0M parameters over 256 bytes of vocabulary."""
KEEP_EVERY = 100
"""Steps between two states on the disk."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same for every encoding that is to be compared."""

    steps: int = 2400
    rows: int = 4
    """Windows of the trained length in a step."""
    seed: int = 0
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    warm_up_steps: int = 30
    falling_from: float = 0.3
    """Share of the steps after which the rates fall, in a straight line to 0."""
    embedding_std: float = 0.3
    """Beside sinusoids of size 1: where token and position are as large, position is learned late."""
    validate_every: int = 200
    validation_windows: int = 64
    """Of the held-out text in between; at the end all of it."""

    def rate(self, step: int) -> float:
        """Factor on the rates."""
        done = step / self.steps
        falling = min(1.0, (1 - done) / (1 - self.falling_from))
        return min(falling, (step + 1) / self.warm_up_steps)


@dataclasses.dataclass
class Progress:
    """After a step; bits are of a byte."""

    step: int
    bits: float
    validation_bits: float | None


class TrainingStep(PlainStep):
    """The reference's attention through PyTorch's fused kernels: rows without padding, all tokens at once."""

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor:
        if sinks is not None or heads.softcap or heads.window >= 0 or heads.chunk or heads.kv_heads != heads.num_heads:
            return super()._attend(layer, query, key, value, bias, sinks, heads)
        q, k, v = (x.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        if bias is None:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
        else:
            hidden = torch.full(bias.shape[-2:], float("-inf")).triu(1)  # [T, T]
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias + hidden, scale=heads.scale)
        return output.transpose(1, 2).flatten(2)  # [B, T, H*D]


def train(
    encoding: str,
    text: bytes,
    folder: Path,
    settings: Settings | None = None,
    architecture: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda step: None,
) -> dict[str, Any]:
    """Train, or go on with what was stopped, and write ``ENCODING.safetensors`` and its log ``ENCODING.json``.

    text: bytes, whose end is held out and written beside the weights as ``heldout.txt``. Returns the log, without
    training where the same run has ended there. Raises ConfigError where other weights are there already without
    ``force``, a run with other settings was stopped there, or the folder is of another text.
    """
    settings = settings or Settings()
    config = DecoderConfig(
        encoding=encoding, seed=settings.seed, **(ARCHITECTURE if architecture is None else architecture)
    )
    output, state = folder / f"{encoding}.safetensors", folder / f".{encoding}.state"
    held_out, kept = training_text.split(text)[1], folder / HELD_OUT.name
    others = [path for path in folder.glob("*.safetensors") if path != output or not force]
    if others and kept.exists() and kept.read_bytes() != held_out:
        raise ConfigError(f"{folder} holds weights of another text, {others[0].name}; give another -o")
    run = Run(config, settings, text)
    if output.exists() and not force:
        log = _log(folder / f"{encoding}.json")
        if log.get("identity") != run.identity:
            raise ConfigError(f"{output} exists, of another run; --force trains it again")
        return log
    if state.exists():
        run.load(state)
    folder.mkdir(parents=True, exist_ok=True)
    for made in run.steps():
        progress(made)
        if made.step % KEEP_EVERY == 0:
            run.save(state)
    log = run.finish()
    write_report(kept, held_out)
    write(folder, encoding, run.decoder.state_dict(), log)
    state.unlink(missing_ok=True)
    return log


def _log(path: Path) -> dict[str, Any]:
    """Of a run that has ended; empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Run:
    """A decoder, its optimizers, and where they stand."""

    def __init__(self, config: DecoderConfig, settings: Settings, text: bytes) -> None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        self.config, self.settings = config, settings
        self.digest = hashlib.sha256(text).hexdigest()
        self.text, self.held_out = (
            torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in training_text.split(text)
        )
        self.decoder = Decoder(config)
        start(self.decoder, settings)
        inner = {id(p) for p in self.decoder.blocks.parameters() if p.dim() == 2}
        matrices = [p for p in self.decoder.parameters() if id(p) in inner]
        others = [p for p in self.decoder.parameters() if id(p) not in inner]
        self.optimizers = (
            Muon(matrices, lr=settings.matrix_rate),
            torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.done = 0
        self.seconds = 0.0
        self.losses: list[tuple[int, float, float]] = []
        """Step, bits of its own windows, bits of some of the held-out text."""

    def steps(self) -> Iterator[Progress]:
        """Take those that are left, one at a time."""
        while self.done < self.settings.steps:
            begin = time.perf_counter()
            bits = self._step()
            self.done += 1
            validation = None
            if self.done % self.settings.validate_every == 0 or self.done == self.settings.steps:
                validation = bits_per_byte(self.decoder, self.held_out, self.length, self.settings.validation_windows)
                self.losses.append((self.done, round(bits, 4), round(validation, 4)))
            self.seconds += time.perf_counter() - begin
            yield Progress(self.done, bits, validation)

    @property
    def length(self) -> int:
        return self.config.max_position_embeddings

    def _step(self) -> float:
        draws = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.done)  # of a step, so runs go on
        places = torch.randint(len(self.text) - self.length, (self.settings.rows,), generator=draws)
        windows = torch.stack([self.text[place : place + self.length + 1] for place in places.tolist()])
        self.decoder.train()
        logits = forward(self.decoder, windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        self.decoder.zero_grad()
        loss.backward()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * self.settings.rate(self.done)
        for optimizer in self.optimizers:
            optimizer.step()
        self.decoder.eval()
        return loss.item() / math.log(2)

    def finish(self) -> dict[str, Any]:
        """Round the weights as they are kept, and return the log."""
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.copy_(parameter.half())
        return {
            "identity": self.identity,
            "config": self.config.to_dict(),
            "settings": dataclasses.asdict(self.settings),
            "text": {"sha256": self.digest, "bytes": len(self.text) + len(self.held_out)},
            "parameters": sum(p.numel() for p in self.decoder.parameters()),
            "validation_bits_per_byte": round(bits_per_byte(self.decoder, self.held_out, self.length), 4),
            "losses": self.losses,
            "seconds": round(self.seconds),
            "torch": torch.__version__,
        }

    @property
    def identity(self) -> str:
        """What must be the same for a run to go on: a digest of configuration, settings and text."""
        parts = (self.config.to_dict(), dataclasses.asdict(self.settings), self.digest)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        state = {
            "identity": self.identity,
            "decoder": self.decoder.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        try:
            torch.save(state, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer has an error of its own
            raise ExportError(f"cannot write {path}: {system_reason(error)}") from None
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Raises ConfigError for another run's state, CheckpointError for what is none."""
        try:
            state = torch.load(path, weights_only=True)
            if state["identity"] != self.identity:
                raise ConfigError(f"{path} is of a run with other settings or another text; remove it to begin anew")
            self.decoder.load_state_dict(state["decoder"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        except ConfigError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} is no state of a training run ({error}); remove it to begin anew") from None
        self.done, self.seconds = state["done"], state["seconds"]
        self.losses = [(step, bits, validation) for step, bits, validation in state["losses"]]


def start(decoder: Decoder, settings: Settings) -> None:
    """Weights to begin with: branches and the head at zero, a table of positions as sinusoids.

    A table of random vectors learns in so few steps little of which positions are neighbours.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    for name, parameter in decoder.named_parameters():
        if name.startswith("encoding."):
            continue
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif name.startswith("head.") or name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif name.startswith("embedding."):
            nn.init.normal_(parameter, 0.0, settings.embedding_std, generator=generator)
        else:
            nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5, generator=generator)
    for module in decoder.encoding.modules():
        if isinstance(module, nn.Embedding):
            with torch.no_grad():
                rows = torch.arange(module.num_embeddings)[None]
                module.weight.copy_(Sinusoidal(decoder.config).embed(rows)[0])


def forward(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, T]`` to logits ``[B, T, V]``."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return decoder(tokens, positions, TrainingStep(torch.ones_like(tokens)))


@torch.no_grad()
def bits_per_byte(decoder: Decoder, text: torch.Tensor, length: int, windows: int | None = None) -> float:
    """Mean over all but the first byte of windows in a row; all that are whole, or some, evenly apart."""
    rows = text[: len(text) // length * length].view(-1, length)
    if windows is not None:
        rows = rows[:: max(1, len(rows) // windows)][:windows]
    total = sum(
        F.cross_entropy(forward(decoder, part)[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in rows.split(8)
    )
    return total / (rows.numel() - len(rows)) / math.log(2)
