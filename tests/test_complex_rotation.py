"""Rotations that a modeling file writes with complex numbers: proven and replaced, or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from op_inputs import randn
from op_oracles import rotated
from torch import nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.llama4 import modeling_llama4

from pe_onnx.errors import CheckpointError
from pe_onnx.models.complex_rotation import substitutions
from pe_onnx.models.substitution import installed

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"llama4_text": (modeling_llama4, 2), "deepseek_v2": (modeling_deepseek_v2, 1)}
"""The modeling file, and the axis of the heads."""
POSITIONS = torch.tensor([[3, 4, 5, 900], [0, 1, 70, 71]])


def apply_complex(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs_cis[:, None] for x in (xq, xk))
    return tuple(torch.view_as_real(x).flatten(-2) for x in pairs)


class HandRotaryEmbedding(nn.Module):
    """A complex rotary module."""

    def __init__(self, scaling: float = 1.0) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(20.0 ** -(torch.arange(4) / 4))
        self.attention_scaling = scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None].float() * self.inv_freq
        return torch.polar(torch.ones_like(angles), angles) * self.attention_scaling


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``by_hand(function, kind)``: a modeling file with this function, and a module of this kind in it."""

    def make(function: Callable[..., Any], kind: type[nn.Module], **options: Any) -> tuple[ModuleType, nn.Module]:
        home = ModuleType("made_by_hand")
        home.apply_rotary_emb = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_by_hand", home)
        monkeypatch.setattr(kind, "__module__", "made_by_hand")
        return home, kind(**options)

    return make


def through(home: ModuleType, rotary: nn.Module, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> Any:
    return home.apply_rotary_emb(q, k, freqs_cis=rotary(q, positions))  # type: ignore[attr-defined]


def drawn(heads_axis: int, size: int) -> list[torch.Tensor]:
    return [randn(2, H, 4, size) if heads_axis == 1 else randn(2, 4, H, size) for H in (4, 2)]


@pytest.mark.parametrize("name", FILES)
def test_the_rotation_of_transformers_without_complex_numbers(name: str) -> None:
    home, heads_axis = FILES[name]
    model = tiny_models.build(name)
    rotary = model.model.rotary_emb
    q, k = drawn(heads_axis, 2 * rotary.inv_freq.numel())
    want = through(home, rotary, q, k, POSITIONS)
    original = home.apply_rotary_emb
    with installed(substitutions(model)):
        tables = rotary(q, POSITIONS)
        have = through(home, rotary, q, k, POSITIONS)
        assert home.apply_rotary_emb is not original
    assert not tables.is_complex()
    angles = POSITIONS[..., None].double() * rotary.inv_freq
    for x, a, b in zip((q, k), want, have, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        heads_first = x if heads_axis == 1 else x.transpose(1, 2)
        loops = torch.from_numpy(rotated(heads_first, angles.cos(), angles.sin(), True)).float()
        torch.testing.assert_close(b if heads_axis == 1 else b.transpose(1, 2), loops, rtol=0, atol=5e-4)  # at 900
        assert (b - x).abs().max() > 0.1
    assert home.apply_rotary_emb is original
    assert "forward" not in vars(rotary)
    assert rotary(q, POSITIONS).is_complex()


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_by_hand(scaling: float, by_hand: Callable[..., Any]) -> None:
    home, rotary = by_hand(apply_complex, HandRotaryEmbedding, scaling=scaling)
    q, k = drawn(1, 8)
    want = through(home, rotary, q, k, POSITIONS)
    with installed(substitutions(rotary)):
        have = through(home, rotary, q, k, POSITIONS)
        assert not rotary(q, POSITIONS).is_complex()
    for a, b in zip(want, have, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def conjugated(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return apply_complex(xq, xk, freqs_cis.conj().resolve_conj())


def halves(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Real and imaginary parts in two halves."""
    pairs = (torch.complex(*x.chunk(2, -1)) * freqs_cis[:, None] for x in (xq, xk))
    return tuple(torch.cat((x.real, x.imag), -1) for x in pairs)


def scaled(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return apply_complex(1.001 * xq, xk, freqs_cis)


@pytest.mark.parametrize("function", [conjugated, halves, scaled])
def test_another_function_is_refused_by_name(function: Callable[..., Any], by_hand: Callable[..., Any]) -> None:
    _, rotary = by_hand(function, HandRotaryEmbedding)
    with pytest.raises(CheckpointError, match=rf"{function.__name__}: its complex rotation is not understood"):
        list(substitutions(rotary))


class DoubledRotaryEmbedding(HandRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = (2 * position_ids[..., None]).float() * self.inv_freq
        return torch.polar(torch.ones_like(angles), angles) * self.attention_scaling


class CappedRotaryEmbedding(HandRotaryEmbedding):
    """Differs at far positions alone."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None].clamp(max=2048).float() * self.inv_freq
        return torch.polar(torch.ones_like(angles), angles) * self.attention_scaling


@pytest.mark.parametrize("kind", [DoubledRotaryEmbedding, CappedRotaryEmbedding])
def test_other_frequencies_are_refused_by_name(kind: type[nn.Module], by_hand: Callable[..., Any]) -> None:
    _, rotary = by_hand(apply_complex, kind)
    with pytest.raises(CheckpointError, match=f"{kind.__name__}: its complex frequencies are not understood"):
        list(substitutions(rotary))


def test_real_rotations_are_left_alone() -> None:
    assert list(substitutions(tiny_models.build("llama"))) == []
