"""The proof of a bridged module: whatever is doctored in it after bridging, it is refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import WINDOW
from variants import rope

from pe_onnx.errors import CheckpointError
from pe_onnx.models import rotation
from pe_onnx.models.attention import CompactStep, MaskedStep, Step
from pe_onnx.models.bridge import BridgedDecoder, bridge, prove
from pe_onnx.models.observed import Observed
from pe_onnx.models.proof import BEYOND, PROMPT, Proof
from pe_onnx.tolerance import PROOF, tolerance_for

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ("ort", "portable")
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 2.0},
    "llama4_text": {"attention_chunk_size": WINDOW},
    "llama": rope("dynamic", factor=2.0),  # its rows are proven one at a time
}
Patch = pytest.MonkeyPatch


@functools.lru_cache(maxsize=1)
def bridged(name: str, target: Any) -> tuple[BridgedDecoder, Observed]:
    module, observed, _ = bridge(tiny_models.build(name, **OPTIONS.get(name, {})), target, last_only=False)
    return module, observed


def attending(change: Callable[[dict[str, Any]], None]) -> Callable[[Patch], None]:
    """A fault in what a layer asks of its step."""

    def plant(monkeypatch: Patch) -> None:
        original = Step.attend

        def attend(self: Step, *args: Any, **named: Any) -> torch.Tensor:
            change(named)
            return original(self, *args, **named)

        monkeypatch.setattr(Step, "attend", attend)

    return plant


def running(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A fault around the whole module: ``change(forward, ids, mask, positions, past)``."""

    def plant(monkeypatch: Patch) -> None:
        original = BridgedDecoder.forward
        monkeypatch.setattr(
            BridgedDecoder, "forward", lambda self, *inputs: change(functools.partial(original, self), *inputs)
        )

    return plant


def rotation_off(monkeypatch: Patch) -> None:
    monkeypatch.setattr(rotation, "rotary_embedding", lambda x, *others: x)


def pairs_confused(monkeypatch: Patch) -> None:
    original = rotation.rotary_embedding
    monkeypatch.setattr(rotation, "rotary_embedding", lambda x, c, s, n, pairs: original(x, c, s, n, not pairs))


def shifted(forward: Any, ids: Any, mask: Any, positions: torch.Tensor, past: Any) -> Any:
    return forward(ids, mask, positions + 1, past)


def shifted_in_steps(forward: Any, ids: torch.Tensor, mask: Any, positions: torch.Tensor, past: Any) -> Any:
    return forward(ids, mask, positions + (ids.shape[1] == 1), past)


def slots(forward: Any, ids: torch.Tensor, mask: Any, positions: torch.Tensor, past: Any) -> Any:
    """The cache's length in place of the row's."""
    P, T = past[0][0].shape[2], ids.shape[1]
    return forward(ids, mask, (P + torch.arange(T)).expand_as(positions), past)


def leaking(forward: Any, *inputs: Any) -> Any:
    logits, present = forward(*inputs)
    return logits + 0.01 * logits.mean(0, keepdim=True), present


def keys_for_values(forward: Any, *inputs: Any) -> Any:
    logits, present = forward(*inputs)
    return logits, [(values, keys) for keys, values in present]


def forgotten(forward: Any, ids: Any, mask: Any, positions: Any, past: Any) -> Any:
    """What was cached is zero."""
    return forward(ids, mask, positions, [(0 * keys, values) for keys, values in past])


def padding_seen(forward: Any, ids: Any, mask: torch.Tensor, positions: Any, past: Any) -> Any:
    return forward(ids, torch.ones_like(mask), positions, past)


def not_a_number(forward: Any, *inputs: Any) -> Any:
    logits, present = forward(*inputs)
    return logits.masked_fill(torch.arange(logits.shape[-1]) == 5, float("nan")), present


FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "window dropped": ("mistral", attending(lambda named: named.update(window=-1))),
    "window one longer": ("mistral", attending(lambda named: named.update(window=named["window"] + 1))),
    "window one shorter": ("mistral", attending(lambda named: named.update(window=named["window"] - 1))),
    "window on every layer": ("cohere2", attending(lambda named: named.update(window=WINDOW))),
    "chunks dropped": ("llama4_text", attending(lambda named: named.update(chunk=0))),
    "window for chunks": ("llama4_text", attending(lambda named: named.update(chunk=0, window=named["chunk"] or -1))),
    "scale": ("mistral", attending(lambda named: named.update(scale=1.01 * named["scale"]))),
    "softcap dropped": ("gemma2", attending(lambda named: named.update(softcap=0.0))),
    "softcap": ("gemma2", attending(lambda named: named.update(softcap=1.1 * named["softcap"]))),
    "sinks dropped": ("gpt_oss", attending(lambda named: named.update(sinks=None))),
    "sinks of other heads": ("gpt_oss", attending(lambda named: named.update(sinks=named["sinks"].flip(0)))),
    "bias dropped": ("bloom", attending(lambda named: named.update(bias=None))),
    "rotation off": ("mistral", rotation_off),
    "pairs of the rotation": ("mistral", pairs_confused),
    "positions shifted": ("gpt2", running(shifted)),
    "positions shifted, rotary": ("mistral", running(shifted)),
    "positions shifted in steps": ("gpt2", running(shifted_in_steps)),
    "positions shifted in steps, rotary": ("mistral", running(shifted_in_steps)),
    "rows leaking into each other": ("mistral", running(leaking)),
    "keys for values": ("mistral", running(keys_for_values)),
    "the past forgotten": ("mistral", running(forgotten)),
    "padding seen": ("mistral", running(padding_seen)),
    "not a number": ("mistral", running(not_a_number)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", sorted({name for name, _ in FAULTS.values()}))
def test_undoctored_it_is_proven(name: str, target: str) -> None:
    assert isinstance(prove(*bridged(name, target)), Proof)


CASES = sorted(itertools.product(FAULTS, TARGETS), key=lambda case: (FAULTS[case[0]][0], case[1]))
"""Those of one bridged model beside each other."""


@pytest.mark.parametrize(("fault", "target"), CASES)
def test_a_fault_is_refused(fault: str, target: str, monkeypatch: Patch) -> None:
    name, plant = FAULTS[fault]
    module, observed = bridged(name, target)
    plant(monkeypatch)
    with pytest.raises(CheckpointError, match=f"{type(module.model).__name__} cannot be exported exactly: with its "):
        prove(module, observed)


@pytest.mark.parametrize(
    ("name", "target"), [("gpt2", "ort"), ("gpt2", "portable"), ("mistral", "ort"), ("llama", "ort")]
)
def test_slots_for_positions_are_refused(name: str, target: str, monkeypatch: Patch) -> None:
    """On ort a buffer is longer than what it holds; on portable rows are padded, which rotation alone does not mind."""
    module, observed = bridged(name, target)
    running(slots)(monkeypatch)
    with pytest.raises(CheckpointError, match="off by"):
        prove(module, observed)


def test_a_slot_too_many_is_refused(monkeypatch: Patch) -> None:
    module, observed = bridged("gpt2", "ort")
    original = CompactStep.__init__

    def beyond(self: CompactStep, *args: Any) -> None:
        original(self, *args)
        self.last_slots = self.last_slots + 1

    monkeypatch.setattr(CompactStep, "__init__", beyond)
    with pytest.raises(CheckpointError, match="cannot be exported exactly"):
        prove(module, observed)


def test_a_window_that_counts_padding_is_no_fault_of_left_padding(monkeypatch: Patch) -> None:
    """On the left of a row nothing is between its tokens: slots and positions have the same distances."""
    module, observed = bridged("mistral", "portable")
    original = MaskedStep.__init__

    def by_slots(self: MaskedStep, mask: torch.Tensor, *args: Any) -> None:
        original(self, mask, *args)
        self.positions = torch.arange(mask.shape[1]).expand_as(mask)
        self.query_positions = self.positions[:, -self.new_tokens :]

    monkeypatch.setattr(MaskedStep, "__init__", by_slots)
    prove(module, observed)


class TestAWindowOf4096:
    """The trial behind a long past reaches it with a few tokens of forward."""

    @pytest.fixture(scope="class")
    def wide(self) -> tuple[BridgedDecoder, Observed, list[int]]:
        """The bridge of Mistral, and the tokens of every run of its untouched or bridged model."""
        model = tiny_models.build("mistral", sliding_window=4096, num_hidden_layers=1)
        tokens: list[int] = []
        model.model.embed_tokens.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
        module, observed, _ = bridge(model, "ort", False)
        return module, observed, tokens

    def test_it_is_passed_without_its_tokens(self, wide: Any) -> None:
        module, observed, tokens = wide
        proof = prove(module, observed)
        assert [trial.past for trial in proof.trials] == [0, 4096 + BEYOND]
        assert max(tokens) == PROMPT

    @pytest.mark.parametrize("change", [lambda w: -1, lambda w: w + 1, lambda w: w - 1], ids=["none", "+1", "-1"])
    def test_another_window_is_refused(self, wide: Any, change: Any, monkeypatch: Patch) -> None:
        module, observed, _ = wide
        attending(lambda named: named.update(window=change(named["window"])))(monkeypatch)
        with pytest.raises(CheckpointError, match="off by"):
            prove(module, observed)


def test_the_tolerance_is_far_above_rounding() -> None:
    module, observed = bridged("mistral", "ort")
    proof = prove(module, observed)

    def run(feed: Any, past: Any) -> Any:
        return module(feed.input_ids, feed.attention_mask, feed.position_ids, past)

    allowed = PROOF * tolerance_for("fp32", module.layers).error
    assert proof.error(run, "ort", module.caches, torch.float32) < allowed / 5
