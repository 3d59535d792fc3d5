"""transformers' mask functions under our name: what they mean, or which part of them is not understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from pe_onnx.errors import CheckpointError
from pe_onnx.models.attention import MaskedStep
from pe_onnx.models.interface import IMPLEMENTATION, register
from pe_onnx.models.masks import Mask

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, CHUNK, TOKENS = 5, 4, 11
Create = Callable[..., Any]


def config(attention: str = IMPLEMENTATION) -> PreTrainedConfig:
    register()
    made = tiny_models.config("llama")
    made.sliding_window, made.attention_chunk_size = WINDOW, CHUNK
    made._attn_implementation = attention
    return made


def mask(create: Create, config: PreTrainedConfig, padded: int = 0, **options: Any) -> Any:
    """Of two rows of eleven tokens, the second with some padding on the left."""
    attention_mask = torch.ones(2, TOKENS, dtype=torch.int64)
    attention_mask[1, :padded] = 0
    given = {"attention_mask": attention_mask, "past_key_values": DynamicCache(), **options}
    return create(config=config, inputs_embeds=torch.zeros(2, TOKENS, 64), **given)


MEANINGS: dict[str, tuple[Create, Mask]] = {
    "causal": (create_causal_mask, Mask()),
    "window": (create_sliding_window_causal_mask, Mask(window=WINDOW)),
    "chunks": (create_chunked_causal_mask, Mask(chunk=CHUNK)),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name: str) -> None:
    create, meaning = MEANINGS[name]
    assert mask(create, config()) == meaning


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("name", MEANINGS)
def test_the_meaning_is_that_of_the_tensor(name: str, padded: int) -> None:
    """What transformers builds for eager attention, against the keys that our step sees; no other meaning fits."""
    create, _ = MEANINGS[name]
    valid = torch.ones(2, TOKENS, dtype=torch.int64)
    valid[1, :padded] = 0
    step = MaskedStep(valid, TOKENS, [(torch.zeros(2, 1, 0, 8),) * 2])
    tensor = mask(create, config("eager"), padded) == 0  # [B, 1, T, S]
    tokens = valid.bool()[:, None, :, None]
    same = {
        other: torch.equal(step.seen(meaning.window, meaning.chunk) & tokens, tensor & tokens)
        for other, (_, meaning) in MEANINGS.items()
    }
    assert same == {other: other == name for other in MEANINGS}


def shorter(size: int) -> Create:
    def created(**options: Any) -> Any:
        return create_sliding_window_causal_mask(and_mask_function=sliding_window_overlay(size), **options)

    return created


@pytest.mark.parametrize(("size", "window"), [(3, 3), (8, WINDOW)])
def test_of_two_windows_the_smaller_holds(size: int, window: int) -> None:
    assert mask(shorter(size), config()) == Mask(window=window)


def test_a_window_beside_chunks() -> None:
    both = mask(create_chunked_causal_mask, config(), and_mask_function=sliding_window_overlay(3))
    assert both == Mask(window=3, chunk=CHUNK)


def every_other_key(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key % 2 == 0


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize(
    ("option", "part"), [("and_mask_function", "every_other_key"), ("or_mask_function", "or_masks")]
)
def test_a_custom_part_is_refused_by_name(option: str, part: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"its attention mask has a part '{part}' that is not understood"):
        mask(MEANINGS[name][0], config(), **{option: every_other_key})


def test_a_part_that_only_bears_a_known_name_is_refused() -> None:
    def sliding_window_overlay(sliding_window: int) -> Create:
        return lambda batch, head, query, key: key > query - 2 * sliding_window

    part = sliding_window_overlay(3)
    part.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    with pytest.raises(CheckpointError, match="a part 'sliding_window_overlay' that is not understood"):
        mask(create_causal_mask, config(), and_mask_function=part)


@pytest.mark.parametrize("name", MEANINGS)
def test_blocks_that_see_each_other_are_refused(name: str) -> None:
    blocks = torch.full((2, TOKENS), -1)
    with pytest.raises(CheckpointError, match="a part 'or_masks'"):
        mask(MEANINGS[name][0], config(), block_sequence_ids=blocks)


def test_packed_texts_are_refused() -> None:
    """Several texts in a row, which transformers reads from positions where it is given neither mask nor cache."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)
    with pytest.raises(CheckpointError, match="that is not understood"):
        mask(create_causal_mask, config(), attention_mask=None, past_key_values=None, position_ids=positions)


def test_bidirectional_is_not_causal() -> None:
    assert not mask(create_bidirectional_mask, config(), past_key_values=None).causal
    backwards = config()
    backwards.is_causal = False
    assert not mask(create_causal_mask, backwards).causal


def test_a_bidirectional_window_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sliding_window_bidirectional_overlay"):
        mask(create_bidirectional_sliding_window_mask, config(), past_key_values=None)


def test_a_window_that_is_not_causal_is_bidirectional() -> None:
    only_a_window = mask(
        create_bidirectional_mask, config(), past_key_values=None, and_mask_function=sliding_window_overlay(3)
    )
    assert not only_a_window.causal


@pytest.mark.parametrize(
    "use",
    [lambda m: m.shape, lambda m: m[..., :3], lambda m: torch.zeros(1) + m, lambda m: m.to(torch.float32)],
    ids=["shape", "slice", "sum", "to"],
)
def test_a_file_that_computes_with_its_mask_is_refused(use: Callable[[Any], Any]) -> None:
    """Not taken for a tensor, and no error of Python's own."""
    with pytest.raises(CheckpointError, match="it computes with the mask itself"):
        use(Mask())


def test_under_another_name_masks_are_tensors() -> None:
    assert isinstance(mask(create_causal_mask, config("eager")), torch.Tensor)
