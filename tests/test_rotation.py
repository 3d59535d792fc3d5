"""Rotations of modeling files: which reading is proven, what stands in for it, and what is left as it is."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from op_inputs import randn
from op_oracles import rotated
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from pe_onnx.models.rotation import LAYOUTS, READINGS, Call, Reading, Rotary, find, prove, recorded
from pe_onnx.models.substitution import Substitution, installed

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[..., Any]
SPREAD = {
    "repeated halves": lambda table: torch.cat((table, table), -1),
    "repeated pairs": lambda table: table.repeat_interleave(2, -1),
    "not repeated": lambda table: table,
}
"""``[B, T, R/2]`` to what a modeling file's rotary module gives; the inverse of LAYOUTS."""


def tables(layout: str, half: int = 4, start: int = 3, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of two rows, as the layout has them."""
    positions = start + torch.arange(2)[:, None] + torch.arange(tokens)
    angles = positions[..., None] * 50.0 ** -(torch.arange(half) / half)
    return SPREAD[layout](angles.cos()), SPREAD[layout](angles.sin())


def by_loops(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, reading: Reading, axis: int) -> torch.Tensor:
    """Pair by pair, in float64."""
    first, sines = LAYOUTS[reading.layout](cos), LAYOUTS[reading.layout](sin)
    heads_first = x if axis == 1 else x.transpose(1, 2)
    out = torch.from_numpy(rotated(heads_first, first, reading.sign * sines, reading.interleaved)).float()
    return out if axis == 1 else out.transpose(1, 2)


def two_tensors(reading: Reading) -> Function:
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (by_loops(x, cos, sin, reading, unsqueeze_dim) for x in (q, k))
        return first, second

    return apply_rotary_pos_emb


def one_tensor(reading: Reading) -> Function:
    def apply_rotary_pos_emb(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> torch.Tensor:
        return by_loops(x, cos, sin, reading, unsqueeze_dim)

    return apply_rotary_pos_emb


def as_file(function: Function) -> Rotary:
    """A modeling file that holds this function."""
    home = ModuleType("modeling_made_by_hand")
    home.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
    return Rotary(home, "apply_rotary_pos_emb", function)


def inputs(axis: int, heads: tuple[int, ...], size: int, seed: int = 0) -> list[torch.Tensor]:
    shapes = [(2, H, 5, size) if axis == 1 else (2, 5, H, size) for H in heads]
    return [randn(*shape, seed=seed) for shape in shapes]


def proven(rotary: Rotary, *calls: Function) -> Substitution | None:
    """What stands in for the function after these calls were recorded."""
    with recorded([rotary]):
        for call in calls:
            call(rotary.home.apply_rotary_pos_emb)
    return prove(rotary)


def forbid(rotary: Rotary) -> None:
    """From now on the original must not be called."""

    @functools.wraps(rotary.original)
    def forbidden(*args: Any, **named: Any) -> Any:
        raise AssertionError("the original was called")

    rotary.original = forbidden


def assert_close(have: Any, want: Any) -> None:
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [one_tensor, two_tensors])
@pytest.mark.parametrize("size", [8, 11], ids=["whole", "partial"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_every_reading_is_proven_and_equal_on_other_input(reading: Reading, axis: int, size: int, make: Any) -> None:
    function = make(reading)
    rotary = as_file(function)
    heads = (3,) if make is one_tensor else (3, 1)
    substitution = proven(rotary, lambda f: f(*inputs(axis, heads, size), *tables(reading.layout), unsqueeze_dim=axis))
    assert substitution is not None
    x, (cos, sin) = inputs(axis, heads, size, seed=1), tables(reading.layout, start=70)
    want = function(*x, cos, sin, unsqueeze_dim=axis)
    forbid(rotary)
    with installed([substitution]):
        have = rotary.home.apply_rotary_pos_emb(*x, cos, sin, unsqueeze_dim=axis)
    assert type(have) is type(want)
    assert_close(have, want)


@pytest.mark.parametrize(("a", "b"), itertools.combinations(READINGS, 2), ids=str)
def test_no_two_readings_compute_the_same(a: Reading, b: Reading) -> None:
    """On tables that both can read: so a wrong reading would be seen above."""
    x, half = randn(2, 3, 5, 16), randn(2, 5, 4, seed=1)
    cos, sin = (torch.cat((t, t.flip(-1)), -1) for t in (half, half + 0.5))
    assert (by_loops(x, cos, sin, a, 1) - by_loops(x, cos, sin, b, 1)).abs().max() > 0.1


REAL = {
    "llama": (modeling_llama, (False, "repeated halves", 1)),
    "cohere": (modeling_cohere, (True, "repeated pairs", 1)),
    "gpt_oss": (modeling_gpt_oss, (False, "not repeated", 1)),
}


@pytest.mark.parametrize("name", REAL)
def test_functions_of_transformers(name: str) -> None:
    home, (interleaved, layout, sign) = REAL[name]
    rotary = Rotary(home, "apply_rotary_pos_emb", home.apply_rotary_pos_emb)
    substitution = proven(rotary, lambda f: f(*inputs(1, (4, 2), 8), *tables(layout)))
    assert substitution is not None
    x, (cos, sin) = inputs(1, (4, 2), 8, seed=1), tables(layout, start=70)
    have = substitution.replacement(*x, cos, sin)
    assert_close(have, [by_loops(t, cos, sin, Reading(interleaved, layout, sign), 1) for t in x])


def test_the_function_of_gptj() -> None:
    """Sines before cosines, tokens before heads, and no unsqueeze_dim."""
    rotary = Rotary(modeling_gptj, "apply_rotary_pos_emb", modeling_gptj.apply_rotary_pos_emb)
    (x,), (cos, sin) = inputs(2, (4,), 8), tables("not repeated")
    substitution = proven(rotary, lambda f: f(x, sin, cos))
    assert substitution is not None
    forbid(rotary)
    assert_close([substitution.replacement(x, sin, cos)], [by_loops(x, cos, sin, READINGS[5], 2)])
    assert READINGS[5] == (True, "not repeated", 1)


HALVES = READINGS[0]


def scaled(*args: Any, **named: Any) -> Any:
    return tuple(1.001 * x for x in two_tensors(HALVES)(*args, **named))


def deinterleaved(*args: Any, **named: Any) -> Any:
    """Rotates pairs, and leaves them in halves, as DeepSeek V3's file."""
    out = two_tensors(READINGS[3])(*args, **named)
    return tuple(torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in out)


def only_the_query(*args: Any, **named: Any) -> Any:
    return two_tensors(HALVES)(*args, **named)[0], args[1]


def another_shape(*args: Any, **named: Any) -> Any:
    return tuple(x.flatten(2) for x in two_tensors(HALVES)(*args, **named))


@pytest.mark.parametrize("function", [scaled, deinterleaved, only_the_query, another_shape])
def test_what_no_reading_matches_is_not_replaced(function: Function) -> None:
    def record(changed: Function) -> Substitution | None:
        rotary = as_file(functools.wraps(two_tensors(HALVES))(changed))
        return proven(rotary, lambda f: f(*inputs(1, (3, 1), 8), *tables("repeated halves")))

    assert record(function) is None
    assert record(two_tensors(HALVES)) is not None


def test_what_was_not_called_is_not_replaced() -> None:
    assert proven(as_file(two_tensors(HALVES))) is None


def test_one_reading_must_hold_for_all_recorded_calls() -> None:
    """Half-split for 3 heads, interleaved for 4."""

    def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return by_loops(x, cos, sin, READINGS[2 if x.shape[1] == 3 else 5], 1)

    def call(heads: int) -> Function:
        return lambda f: f(*inputs(1, (heads,), 8), *tables("not repeated"))

    assert proven(as_file(apply_rotary_pos_emb), call(3)) is not None
    assert proven(as_file(apply_rotary_pos_emb), call(4)) is not None
    assert proven(as_file(apply_rotary_pos_emb), call(3), call(4)) is None


def test_another_keyword_goes_to_the_original() -> None:
    calls: list[int] = []

    def apply_rotary_pos_emb(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1, backwards: bool = False
    ) -> torch.Tensor:
        calls.append(unsqueeze_dim)
        return by_loops(x, cos, -sin if backwards else sin, HALVES, unsqueeze_dim)

    rotary = as_file(apply_rotary_pos_emb)
    (x,), (cos, sin) = inputs(1, (5,), 8), tables("repeated halves")  # as many heads as tokens: any axis will do
    substitution = proven(rotary, lambda f: f(x, cos, sin))
    assert substitution is not None
    calls.clear()
    for named in ({"unsqueeze_dim": 2}, {"backwards": True}):
        have = substitution.replacement(x, cos, sin, **named)
        assert len(calls) == 1
        assert_close([have], [apply_rotary_pos_emb(x, cos, sin, **named)])
        assert (have - substitution.replacement(x, cos, sin)).abs().max() > 0.1
        calls.clear()
    assert not calls  # the proven form does not reach it


def test_a_call_without_tables_by_token_goes_to_the_original() -> None:
    rotary = as_file(two_tensors(HALVES))
    x, (cos, sin) = inputs(1, (3, 1), 8), tables("repeated halves")
    assert rotary.bind(*x, cos[0], sin[0]) is None
    assert isinstance(rotary.bind(*x, cos, sin), Call)


def test_a_tensor_beside_the_tables_must_change_nothing() -> None:
    """``offsets`` do, in whichever call they are given; ``position_ids`` do not."""

    def apply_rotary_pos_emb(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offsets: Any = None, position_ids: Any = None
    ) -> torch.Tensor:
        return by_loops(x, cos, sin, HALVES, 1) + (0 if offsets is None else offsets)

    rotary = as_file(apply_rotary_pos_emb)
    (x,), (cos, sin) = inputs(1, (3,), 8), tables("repeated halves")
    substitution = proven(rotary, lambda f: f(x, cos, sin))
    assert substitution is not None
    assert_close([substitution.replacement(x, cos, sin, torch.ones(1))], [apply_rotary_pos_emb(x, cos, sin) + 1])
    assert proven(rotary, lambda f: f(x, cos, sin, offsets=torch.ones(1))) is None
    assert proven(as_file(apply_rotary_pos_emb), lambda f: f(x, cos, sin, position_ids=torch.ones(1))) is not None


@pytest.mark.parametrize("failing", [False, True])
def test_the_modeling_file_is_as_it_was_afterwards(failing: bool) -> None:
    rotary, other = as_file(two_tensors(HALVES)), ModuleType("other")
    new = Substitution(other, "did_not_exist", 1)
    try:
        with installed([Substitution(rotary.home, rotary.name, scaled), new]):
            assert rotary.home.apply_rotary_pos_emb is scaled
            assert other.did_not_exist == 1
            if failing:
                raise KeyError("inside")
    except KeyError:
        assert failing
    assert rotary.home.apply_rotary_pos_emb is rotary.original
    assert not hasattr(other, "did_not_exist")


def test_recording_ends_after_an_exception() -> None:
    rotary = as_file(two_tensors(HALVES))
    with pytest.raises(ValueError, match="broadcast"), recorded([rotary]):
        rotary.home.apply_rotary_pos_emb(*inputs(1, (3, 1), 8), torch.ones(2, 7, 8), torch.ones(2, 7, 8))
    assert rotary.home.apply_rotary_pos_emb is rotary.original


def test_functions_are_found_in_the_files_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        pass

    for name, found in (("transformers.models.made_by_hand", ["apply_rotary_pos_emb"]), ("made_by_hand", [])):
        home = as_file(two_tensors(HALVES)).home
        home.rotate_half = scaled  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, home)
        monkeypatch.setattr(Attention, "__module__", name)
        assert [rotary.name for rotary in find(nn.Sequential(Attention(), nn.Linear(1, 1)))] == found
