"""What a layer hands to transformers' attention interface: understood and computed exactly, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
from op_inputs import randn
from op_oracles import attended
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pe_onnx.errors import CheckpointError
from pe_onnx.models.attention import cached_step
from pe_onnx.models.bridge import bridge
from pe_onnx.models.interface import IMPLEMENTATION, BridgeCache, attend, current, register, serving
from pe_onnx.models.masks import Mask

pytestmark = pytest.mark.usefixtures("one_thread")

H, K, D, P, T = 4, 2, 16, 6, 3
TARGETS = ("ort", "portable")


class LlamaAttention(nn.Module):
    """Only its name is read."""


def tensors(D: int = D, E: int = D, K: int = K) -> list[torch.Tensor]:
    """Query, key and value of three tokens."""
    return [randn(1, H, T, D), randn(1, K, T, D, seed=1), randn(1, K, T, E, seed=2)]


def past(sizes: Sequence[tuple[int, int]], D: int = D, E: int = D) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six tokens a layer, zeros on the channels beyond the heads' own."""
    made = []
    for layer, (K, size) in enumerate(sizes):
        keys, values = (torch.zeros(1, K, P, size) for _ in range(2))
        keys[..., :D], values[..., :E] = randn(1, K, P, D, seed=3 + layer), randn(1, K, P, E, seed=30 + layer)
        made.append((keys, values))
    return made


def serve(target: str, sizes: Sequence[tuple[int, int]] = ((K, D),), **given: Any) -> BridgeCache:
    mask = torch.ones(1, P + T, dtype=torch.int64)
    return BridgeCache(cached_step(target, mask, T, past(sizes, **given)), sizes)


def run(cache: BridgeCache, *given: Any, layer: int = 0, **named: Any) -> torch.Tensor:
    query, key, value = given
    with serving(cache):
        cache.update(key, value, layer)
        return attend(LlamaAttention(), query, key, value, named.pop("attention_mask", Mask()), **named)[0]


def wanted(
    given: Sequence[torch.Tensor],
    cache: BridgeCache,
    scale: float = D**-0.5,
    window: int = -1,
    layer: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The plain formula in loops, on the keys and values of the unpadded heads: ``[B, T, H, E]``."""
    query, key, value = given
    (keys, values), D, E = cache.step.past[layer], key.shape[-1], value.shape[-1]
    width = max(D, E)  # the loops want keys and values of one size
    keys, values = torch.cat((keys[..., :D], key), 2), torch.cat((values[..., :E], value), 2)
    query, keys, values = (nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, keys, values))

    def seen(b: int, i: int, j: int) -> bool:
        return j <= P + i and (window < 0 or j > P + i - window)

    packed = query.transpose(1, 2).flatten(2)
    out = attended(packed, keys.double().numpy(), values.double().numpy(), seen, scale, softcap)
    return torch.from_numpy(out).unflatten(-1, (H, width))[..., :E].float()


def assert_close(have: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5)


UNDERSTOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scaling": 0.7}, {"scale": 0.7}),
    "softcap": ({"softcap": 1.5, "scaling": 2.0}, {"softcap": 1.5, "scale": 2.0}),
    "window": ({"attention_mask": Mask(window=4)}, {"window": 4}),
    "window of the mask, not of flash attention": ({"sliding_window": 2, "attention_mask": Mask(4)}, {"window": 4}),
    "window of flash attention alone": ({"sliding_window": 2}, {}),
    "nothing of weight": ({"position_ids": torch.ones(1), "use_cache": True, "target_dtype": None, "other": False}, {}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name: str, target: str) -> None:
    named, meaning = UNDERSTOOD[name]
    cache = serve(target)
    have = run(cache, *tensors(), **named)
    assert_close(have, wanted(tensors(), cache, **meaning))
    different = [w for _, w in UNDERSTOOD.values() if w != meaning]
    assert all((have - wanted(tensors(), cache, **w)).abs().max() > 1e-2 for w in different)
    assert cache.masks == [named.get("attention_mask", Mask())]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown tensor": ({"relative_keys": torch.zeros(1)}, "hands relative_keys to its attention"),
    "an unknown number": ({"temperature": 0.5}, "hands temperature to its attention"),
    "an unknown switch": ({"output_gate": True}, "hands output_gate to its attention"),
    "two": ({"one": 1.5, "two": 2.5}, "hands one, two to its attention"),
    "bidirectional by argument": ({"is_causal": False}, "hands is_causal=False to its attention"),
    "bidirectional by mask": ({"attention_mask": Mask(causal=False)}, "its attention is bidirectional"),
    "no mask": ({"attention_mask": None}, "hands its attention no mask"),
    "a tensor for a mask": ({"attention_mask": torch.zeros(1, 1, T, P + T)}, "a mask that its file builds by itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    named, reason = REFUSED[name]
    with pytest.raises(CheckpointError, match=f"^LlamaAttention.*{reason}"):
        run(serve("portable"), *tensors(), **named)


def test_refused_outside_an_export() -> None:
    with pytest.raises(CheckpointError, match="outside an export"):
        attend(LlamaAttention(), *tensors(), Mask())
    with pytest.raises(KeyError), serving(serve("ort")):
        raise KeyError("inside")
    with pytest.raises(CheckpointError, match="outside an export"):
        current()


@pytest.mark.parametrize("target", TARGETS)
def test_layers_that_share_keys_use_the_cache_of_the_first(target: str) -> None:
    """The second layer caches nothing; the third caches its own."""
    sizes = [(K, D), (K, D)]
    cache, shared = serve(target, sizes), tensors()
    own = [shared[0], shared[1] + 1, shared[2] - 1]
    run(cache, *own, layer=1)
    with serving(cache):
        cache.update(shared[1], shared[2], 0)
        cache.update(own[1] + 1, own[2], 1)  # whatever was cached last
        query = randn(1, H, T, D, seed=8)
        have, _ = attend(LlamaAttention(), query, shared[1], shared[2], Mask())
    assert_close(have, wanted([query, *shared[1:]], cache, layer=0))
    assert (have - wanted([query, *shared[1:]], cache, layer=1)).abs().max() > 0.1
    slots = slice(P, P + T)
    for present, new in ((cache.step.presents[0], shared), (cache.step.presents[1], own)):
        for held, given in zip(present, new[1:], strict=True):
            torch.testing.assert_close(held[:, :, slots], given)


def test_keys_that_were_computed_on_are_those_of_the_last_layer() -> None:
    """A file that repeats or casts its keys after the cache hands on another tensor."""
    cache = serve("portable", [(K, D), (K, D)])
    query, key, value = tensors()
    with serving(cache):
        cache.update(key, value, 0)
        cache.update(key + 1, value, 1)
        have, _ = attend(LlamaAttention(), query, key.clone(), value, Mask())
    assert_close(have, wanted([query, key, value], cache, layer=1))


def test_other_values_than_those_that_are_cached_are_refused() -> None:
    cache, (query, key, value) = serve("portable"), tensors()
    with serving(cache):
        cache.update(key, value, 0)
        with pytest.raises(CheckpointError, match="other values than it caches"):
            attend(LlamaAttention(), query, key, value + 1, Mask())


def test_more_heads_than_are_cached_are_refused() -> None:
    """A file that repeats its keys for each head of queries."""
    query, key, value = tensors()
    with pytest.raises(CheckpointError, match="LlamaAttention attends to 4 heads of keys, and caches 2"):
        run(serve("portable"), query, *(x.repeat_interleave(2, 1) for x in (key, value)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("D", "E"), [(16, 8), (8, 16), (10, 10), (5, 3), (3, 11)])
def test_padded_heads_are_exact(D: int, E: int, target: str) -> None:
    """Heads of another size than their cache, and keys of another than values: the scale is that of the keys."""
    size = 16 if target == "ort" else max(D, E)
    cache, given = serve(target, [(K, size)], D=D, E=E), tensors(D, E)
    have = run(cache, *given)
    assert have.shape == (1, T, H, E)
    assert_close(have, wanted(given, cache, scale=D**-0.5))
    if size != D:
        assert (have - wanted(given, cache, scale=size**-0.5)).abs().max() > 1e-2
    for x in cache.step.presents[0]:
        assert x.shape[-1] == size
    assert not cache.step.presents[0][0][..., D:].any()


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_the_caches_of_a_model_with_heads_of_ten_channels(target: str) -> None:
    """In whole groups of 16 channels for ort."""
    model = tiny_models.build("llama", head_dim=10, num_hidden_layers=1)
    module, observed, _ = bridge(model, target, last_only=False)
    assert observed.shapes == [(2, 10, 10)]
    assert module.caches == [(2, 16 if target == "ort" else 10)]


def test_registering_twice_is_registering_once() -> None:
    register()
    register()
    assert AttentionInterface()[IMPLEMENTATION] is attend
    assert IMPLEMENTATION in AttentionMaskInterface()
