"""Frequencies that depend on the length, in the graph: against transformers' modules on both sides of every switch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from variants import LONG, by_layer, rope

from pe_onnx.errors import CheckpointError
from pe_onnx.models.substitution import installed
from pe_onnx.models.switches import rope_types, substitutions, thresholds

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 40
"""max_position_embeddings: where dynamic frequencies begin to grow."""
SWITCH = {"dynamic": LENGTH, "longrope": LONG["original_max_position_embeddings"]}
PARAMETERS: dict[str, dict[str, Any]] = {"dynamic": {"factor": 2.5}, "longrope": LONG}
FORMS: tuple[str | None, ...] = (None, "full_attention", "sliding_attention")
"""Flat, and the two types of a module that has parameters for each: the second does not switch."""


def rotary(kind: str, form: str | None) -> Any:
    """A rotary module of transformers that has seen nothing."""
    if form is None:
        made = tiny_models.config("llama", **rope(kind, **PARAMETERS[kind]), max_position_embeddings=LENGTH)
        return LlamaRotaryEmbedding(made)
    full = {"rope_type": kind, **PARAMETERS[kind]}
    return Gemma3RotaryEmbedding(tiny_models.config("gemma3_text", **by_layer(full), max_position_embeddings=LENGTH))


def call(module: Any, form: str | None, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    named = {} if form is None else {"layer_type": form}
    return module(torch.zeros(1), positions, **named)


def ending_at(length: int) -> torch.Tensor:
    """A row of five tokens that ends there, and one that ends earlier."""
    last = torch.arange(length - 5, length).clamp(min=0)
    return torch.stack((last // 2, last))


def lengths(kind: str) -> list[int]:
    """Long ones first: what they leave behind must not be seen by the short ones."""
    n = SWITCH[kind]
    return [1000, n + 1, n, n - 1, 3 * n, 1, 2, n + 2, n]


CASES = [(kind, form) for kind in SWITCH for form in FORMS]


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_equal_to_a_module_that_has_seen_nothing_else(kind: str, form: str | None) -> None:
    module = rotary(kind, form)
    with installed(substitutions(module)):
        for length in lengths(kind):
            want = call(rotary(kind, form), form, ending_at(length))
            have = call(module, form, ending_at(length))
            torch.testing.assert_close(have, want, rtol=0, atol=1e-6, msg=f"at {length}")
    assert "forward" not in vars(module)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_equal_to_the_init_functions_of_transformers(kind: str, form: str | None) -> None:
    module = rotary(kind, form)
    switches = form != "sliding_attention"
    init = ROPE_INIT_FUNCTIONS[kind] if switches else module.compute_default_rope_parameters
    short = None
    with installed(substitutions(module)):
        for length in sorted(lengths(kind)):
            frequencies, scaling = init(module.config, None, seq_len=torch.tensor(length), layer_type=form)
            short = frequencies if short is None else short
            angles = ending_at(length)[..., None].float() * frequencies
            cos, sin = call(module, form, ending_at(length))
            torch.testing.assert_close(cos, (angles.cos() * scaling).repeat(1, 1, 2), rtol=0, atol=1e-6)
            torch.testing.assert_close(sin, (angles.sin() * scaling).repeat(1, 1, 2), rtol=0, atol=1e-6)
            assert torch.equal(frequencies, short) == (length <= SWITCH[kind] or not switches)


@pytest.mark.parametrize("kind", SWITCH)
def test_a_long_row_switches_the_whole_batch(kind: str) -> None:
    """As transformers decides it; the same short row alone does not switch."""
    module, n = rotary(kind, None), SWITCH[kind]
    short, both = torch.arange(8)[None], torch.stack((torch.arange(8), n + torch.arange(8)))
    with installed(substitutions(module)):
        alone, beside = call(module, None, short), call(module, None, both)
    torch.testing.assert_close(beside, call(rotary(kind, None), None, both), rtol=0, atol=1e-6)
    assert (alone[0][0] - beside[0][0]).abs().max() > 0.1


class Around(nn.Module):
    def __init__(self, module: Any, form: str | None) -> None:
        super().__init__()
        self.module, self.form = module, form

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call(self.module, self.form, positions)


@pytest.mark.parametrize(("kind", "form"), [case for case in CASES if case[1] != "sliding_attention"])
def test_the_graph_does_not_remember(kind: str, form: str | None) -> None:
    """Traced on a few tokens by a module whose memory is full of a long text."""
    module = rotary(kind, form)
    call(module, form, ending_at(5000))
    left = getattr(module, "inv_freq" if form is None else f"{form}_inv_freq").clone()
    with installed(substitutions(module)):
        shapes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        program = torch.export.export(
            Around(module, form), (torch.arange(6).reshape(2, 3),), dynamic_shapes=(shapes,), strict=False
        )
    graph = program.module()
    for length in lengths(kind):
        want = call(rotary(kind, form), form, ending_at(length))
        torch.testing.assert_close(graph(ending_at(length)), want, rtol=0, atol=1e-6, msg=f"at {length}")
    fresh = getattr(rotary(kind, form), "inv_freq" if form is None else f"{form}_inv_freq")
    assert (left - fresh).abs().max() > 1e-3  # a memory there was


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("kind", SWITCH)
def test_thresholds(kind: str, form: str | None) -> None:
    module = rotary(kind, form)
    assert thresholds(nn.ModuleList([nn.Linear(1, 1), module])) == [SWITCH[kind]]
    others = {} if form is None else {"sliding_attention": "default"}
    assert rope_types(module) == {form: kind, **others}


def test_frequencies_that_never_switch_are_left_alone() -> None:
    module = LlamaRotaryEmbedding(tiny_models.config("llama", **rope("linear", factor=4.0)))
    assert list(substitutions(module)) == []
    assert thresholds(module) == []


Forward = Callable[..., Any]


def other_growth(forward: Forward) -> Forward:
    """Beyond the switch theta grows by another law."""

    @functools.wraps(forward)
    def wrapper(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        grown = max(int(position_ids.max()) + 1, LENGTH) / LENGTH
        self.inv_freq = self.original_inv_freq / grown
        return forward(self, x, position_ids)

    return wrapper


def one_later(forward: Forward) -> Forward:
    """Switches one token too late."""

    @functools.wraps(forward)
    def wrapper(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        late = dynamic_rope_update(lambda self, x, position_ids: self.inv_freq)
        self.inv_freq = late(self, x, (position_ids - 1).clamp(min=0))
        return forward(self, x, position_ids)

    return wrapper


def never(forward: Forward) -> Forward:
    return functools.wraps(forward)(lambda self, x, position_ids: forward(self, x, position_ids))


def written_anew(forward: Forward) -> Forward:
    return lambda self, x, position_ids: forward(self, x, position_ids)


UNDECORATED = LlamaRotaryEmbedding.forward.__wrapped__.__wrapped__
DECORATORS = {
    dynamic_rope_update: None,
    other_growth: r"its frequencies at \d+ tokens are not understood",
    one_later: r"its frequencies at \d+ tokens are not understood",
    never: r"its frequencies at \d+ tokens are not understood",
    written_anew: "switches its frequencies in a way not understood",
}


@pytest.mark.parametrize("kind", SWITCH)
@pytest.mark.parametrize("decorator", DECORATORS, ids=lambda d: d.__name__)
def test_a_doctored_module_is_refused_by_name(decorator: Any, kind: str) -> None:
    class Doctored(LlamaRotaryEmbedding):
        forward = decorator(UNDECORATED)

    module, reason = Doctored(rotary(kind, None).config), DECORATORS[decorator]
    if reason is None:
        assert len(list(substitutions(module))) == 1
        return
    with pytest.raises(CheckpointError, match=f"Doctored.*{reason}"):
        list(substitutions(module))
