"""Every family through the real export, against transformers' own cached decode: whole, chunked, token by token, ragged."""

from __future__ import annotations

import functools

import bridged
import pytest
import tiny_models
from variants import VARIANTS

TARGETS = ("ort", "portable")
TOLERANCE = 5e-5
"""Of the logits' spread, float32."""
UNPADDED = {"llama4_text"}
"""transformers 5.23 itself does not compute a padded row as the row alone: we do."""


@functools.lru_cache(maxsize=1)
def model_of(name: str) -> tuple:
    """The model, and what transformers gives: of the variant that is tested now."""
    model_type, options = VARIANTS[name]
    model = tiny_models.build(model_type, **options)
    exported = {target: bridged.export(model, target) for target in ()}
    return model, exported


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, target: str) -> None:
    model, _ = model_of(name)
    exported = bridged.export(model, target)
    references = bridged.references(model, exported.limit, alone=name in UNPADDED)
    errors = {run: bridged.error(exported, reference) for run, reference in references.items()}
    print(name, target, errors)
    assert {run: e for run, e in errors.items() if not e <= TOLERANCE} == {}
