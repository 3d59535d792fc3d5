"""Every family through the real export, against transformers' own cached decode: whole, chunked, stepped, ragged."""

from __future__ import annotations

import functools
import itertools

import bridged
import pytest
import tiny_models
from transformers import PreTrainedModel
from variants import VARIANTS

TARGETS = ("ort", "portable")
TOLERANCE = 5e-5
"""Of the logits' spread, float32."""
UNPADDED = {"llama4_text"}
"""transformers 5.23 itself does not compute a padded row as the row alone: we do."""


Reference = dict[str, bridged.Reference]


@functools.lru_cache(maxsize=2)
def model_of(name: str) -> PreTrainedModel:
    """The model of the variant that is tested now."""
    model_type, options = VARIANTS[name]
    return tiny_models.build(model_type, **options)


@functools.lru_cache(maxsize=2)
def references_of(name: str, limit: int | None) -> Reference:
    """What transformers gives for it."""
    return bridged.references(model_of(name), limit, alone=name in UNPADDED)


PAIRS = list(itertools.product(VARIANTS, TARGETS))
FIRST = {pair for i, pair in enumerate(PAIRS) if i % 4 in (0, 3)}
"""Each variant on one target, in turn; those of FAST on both."""
FAST = {
    *("llama_longrope", "qwen2_window", "gemma2", "gemma3_text", "smollm3", "llama4_text", "cohere", "gpt_oss"),
    *("opt_350m", "xglm", "mpt_six_heads", "falcon_new", "falcon_alibi"),
}
"""One for each thing that a family can have."""
assert VARIANTS.keys() >= FAST
CASES = [
    pytest.param(*pair, marks=() if pair in FIRST and pair[0] in FAST else pytest.mark.slow)
    for pair in PAIRS
    if pair in FIRST or pair[0] in FAST
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_logits_are_those_of_transformers(name: str, target: str) -> None:
    exported = bridged.export(model_of(name), target)
    references = references_of(name, exported.limit)
    errors = {run: bridged.error(exported, reference) for run, reference in references.items()}
    print(f"{name} {target} {max(errors.values()):.1e}")
    assert {run: e for run, e in errors.items() if not e <= TOLERANCE} == {}
