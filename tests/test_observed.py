"""What an eager pass shows of a model: its caches, its tables of positions with their limits, other states refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import TRAINED, VOCAB
from torch import nn
from torch.nn import functional as F

from pe_onnx.errors import CheckpointError
from pe_onnx.models.bridge import bridge, takes_positions
from pe_onnx.models.observed import Observed, observe

pytestmark = pytest.mark.usefixtures("one_thread")

CACHES = [(4, 16, 16)] * 2
REAL: dict[str, Observed] = {
    "gpt2": Observed(CACHES, "learned", TRAINED),
    "opt": Observed(CACHES, "learned", TRAINED),
    "biogpt": Observed(CACHES, "learned", TRAINED),
    "gpt_neo": Observed(CACHES, "learned", TRAINED),
    "bart": Observed(CACHES, "learned", TRAINED),
    "roberta": Observed(CACHES, "learned", TRAINED - 1, first=1),
    "gptj": Observed(CACHES, "fixed", TRAINED),
    "codegen": Observed(CACHES, "fixed", TRAINED),
    "ctrl": Observed(CACHES, "fixed", TRAINED),
    "llama": Observed([(2, 16, 16)] * 2),
    "gpt_neox": Observed(CACHES),
    "bloom": Observed(CACHES),
    "mpt": Observed(CACHES),
}


@pytest.mark.parametrize("name", REAL)
def test_families(name: str) -> None:
    model = tiny_models.build(name)
    assert observe(model, takes_positions(model)) == REAL[name]


def test_another_table_is_another_limit() -> None:
    model = tiny_models.build("gpt2", n_positions=50)
    assert observe(model, True).max_length == 50


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_table_shorter_than_the_proof_is_proven_up_to_its_end(target: Any) -> None:
    _, observed, proof = bridge(tiny_models.build("gpt2", n_positions=16), target, False)
    assert observed.max_length == 16
    assert [len(row) for row in proof.trials[0].rows] == [16, 13]


Look = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gathered(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    index = positions[..., None].expand(-1, -1, table.shape[1])
    return torch.gather(table.expand(len(positions), -1, -1), 1, index)


LOOKS: dict[str, Look] = {
    "embedding": lambda table, positions: F.embedding(positions, table),
    "index": lambda table, positions: table[positions],
    "index of two axes": lambda table, positions: table[positions, :],
    "index of the second axis": lambda table, positions: table.T[:, positions].permute(1, 2, 0),
    "index of the last axis": lambda table, positions: table.T[..., positions].permute(1, 2, 0),
    "index of an offset": lambda table, positions: table[positions + 5],
    "gather": gathered,
    "gather, method": lambda t, p: t.expand(len(p), -1, -1).gather(1, p[..., None].expand(-1, -1, t.shape[1])),
    "index_select": lambda t, p: torch.index_select(t, 0, p.flatten()).unflatten(0, p.shape),
    "index_select, method": lambda t, p: t.index_select(0, p.flatten()).unflatten(0, p.shape),
}
ROWS = 60


class ByHand(nn.Module):
    """One layer of a cache, and a table that is read as ``look`` has it."""

    def __init__(self, look: Look, learned: bool = False, others: int = 0, **config: Any) -> None:
        super().__init__()
        self.config = tiny_models.config("llama")
        for name, value in config.items():
            setattr(self.config, name, value)
        table = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(table) if learned else table
        self.other = torch.ones(others, 8) if others else None
        self.tokens = nn.Embedding(VOCAB, 8)
        self.look = look

    def own_positions(self, tokens: int) -> torch.Tensor:
        return torch.arange(tokens)

    def keep(self, cache: Any, x: torch.Tensor) -> None:
        cache.update(x[:, None], x[:, None, :, :6], 0)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        if position_ids is None:
            position_ids = self.own_positions(input_ids.shape[1])[None]
        x = self.tokens(input_ids) + self.look(self.table, position_ids)
        if self.other is not None:
            x = x + self.other[position_ids]
        self.keep(past_key_values, x)
        return SimpleNamespace(logits=x)


def seen(model: Any) -> Observed:
    return observe(model, takes_positions=True)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", LOOKS)
def test_every_way_to_look_up(name: str, learned: bool) -> None:
    offset = 5 if "offset" in name else 0
    expected = Observed([(1, 8, 6)], "learned" if learned else "fixed", ROWS - offset)
    assert seen(ByHand(LOOKS[name], learned)) == expected


@pytest.mark.parametrize(
    "look",
    [
        lambda table, positions: positions[..., None] * table[0],
        lambda table, positions: table[positions.clamp(max=5)],
        lambda table, positions: table[positions % 4],
        lambda table, positions: table[(positions[:, -1:] - positions)],
        lambda table, positions: table[:7],
    ],
    ids=["computed", "clamped", "modulo", "distances", "slice"],
)
def test_what_is_not_read_by_position_is_no_table(look: Look) -> None:
    assert seen(ByHand(look)) == Observed([(1, 8, 6)])


@pytest.mark.parametrize("others", [40, 90])
def test_the_shortest_of_two_tables_is_the_limit(others: int) -> None:
    observed = seen(ByHand(LOOKS["index"], learned=True, others=others))
    assert (observed.table, observed.max_length) == ("learned", min(ROWS, others))


def test_the_first_position_is_the_model_s_own() -> None:
    model = ByHand(LOOKS["index"])
    model.own_positions = lambda tokens: 2 + torch.arange(tokens)  # type: ignore[method-assign]
    assert seen(model) == Observed([(1, 8, 6)], "fixed", ROWS - 2, first=2)


Change = Callable[[ByHand], None]


def backwards(model: ByHand) -> None:
    model.own_positions = lambda tokens: torch.arange(tokens).flip(0)  # type: ignore[method-assign]


def keeps_nothing(model: ByHand) -> None:
    model.keep = lambda cache, x: None  # type: ignore[method-assign]


def keeps_a_sum(model: ByHand) -> None:
    model.keep = lambda cache, x: cache.update(x[:, None].sum(2, keepdim=True), x[:, None, :1], 0)  # type: ignore[method-assign]


def trips(model: ByHand) -> None:
    model.keep = lambda cache, x: cache.update_recurrent_state(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (backwards, "the positions that it gives its tokens are not understood"),
        (keeps_nothing, "keeps no keys and values in its cache"),
        (keeps_a_sum, "does not cache one key and one value for each token"),
        (trips, "cannot be run with a cache of keys and values: "),
    ],
)
def test_a_model_that_cannot_be_observed_is_refused_by_name(change: Change, reason: str) -> None:
    model = ByHand(LOOKS["index"])
    assert seen(model).table == "fixed"
    change(model)
    with pytest.raises(CheckpointError, match=f"^ByHand.*{reason}"):
        seen(model)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("mamba", ""),
        ("mamba2", ""),
        ("falcon_mamba", ""),
        ("rwkv", ""),
        ("xlstm", ""),
        ("lfm2", "conv"),
        ("qwen3_next", "linear_attention"),
        ("recurrent_gemma", "linear_attention"),
        ("zamba2", "hybrid"),
        ("jamba", ""),
        ("falcon_h1", ""),
        ("bamba", ""),
    ],
)
def test_recurrent_models_are_refused_by_name(name: str, state: str) -> None:
    options = {"lfm2": {"layer_types": ["full_attention", "conv"]}}
    model = tiny_models.build(name, **options.get(name, {}))
    kind = type(model).__name__
    with pytest.raises(CheckpointError) as caught:
        observe(model, takes_positions(model))
    assert str(caught.value).startswith(kind)
    assert state in str(caught.value)
    assert "keys and values" in str(caught.value)
