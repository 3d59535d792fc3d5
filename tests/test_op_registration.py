"""Every operator's registration: schema, fake kernel, gradient formula and translation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import (
    F16,
    F64,
    angles,
    cached_arguments,
    cross_arguments,
    encoder_arguments,
    masked_arguments,
    positions,
    randn,
)

import pe_onnx.custom_ops as ops

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rotary-packed": (ops.rotary_embedding, (randn(3, 17, 5 * 14), *angles(3, 17, 5), 5)),
    "rotary-packed-interleaved-float16": (
        ops.rotary_embedding,
        (randn(3, 17, 5 * 14, dtype=F16), *angles(3, 17, 5), 5, True),
    ),
    "rotary-float16": (ops.rotary_embedding, (randn(1, 3, 63, 10, dtype=F16), *angles(1, 63, 5))),
    "rotary-interleaved": (ops.rotary_embedding, (randn(2, 3, 63, 10), *angles(2, 63, 4), 0, True)),
    "rotary-defaults": (ops.rotary_embedding, (randn(1, 3, 1, 10), *angles(1, 1, 5))),
    "rotary-float64": (ops.rotary_embedding, (randn(2, 3, 17, 8, dtype=F64), *(x.double() for x in angles(2, 17, 3)))),
    "masked-bool": (ops.masked_attention, masked_arguments(3, 17, 6)),
    "masked-added-softcap": (ops.masked_attention, (*masked_arguments(2, 7, 3, "added"), 5.0)),
    "masked-empty-cache-float16": (ops.masked_attention, masked_arguments(1, 63, 0, dtype=F16)),
    "masked-one-token-float64": (ops.masked_attention, masked_arguments(2, 1, 17, "added", F64)),
    "cached-prefill": (ops.cached_attention, cached_arguments(17, 0, [17, 1, 9])),
    "cached-decode-window-softcap": (ops.cached_attention, (*cached_arguments(1, 63, [64, 5], "row"), 3.0, 7)),
    "cached-float16": (ops.cached_attention, cached_arguments(5, 17, [22], "shared", F16)),
    "cached-float64": (ops.cached_attention, cached_arguments(5, 17, [22], "head", F64)),
    "alibi": (ops.alibi_bias, (randn(3), positions(4, 9, count=7), positions(0, 2, count=17))),
    "alibi-float16": (ops.alibi_bias, (randn(3, dtype=F16), positions(4, count=7), positions(0, count=17))),
    "alibi-float64": (ops.alibi_bias, (randn(1, dtype=F64), positions(4, count=7), positions(0, count=17))),
    "alibi-shared-keys-one-token": (ops.alibi_bias, (randn(5), positions(4, 9, count=1), positions(0, count=63))),
    "t5": (ops.t5_relative_bias, (randn(9, 3), positions(4, 60, count=17), positions(0, 2, count=63), 63, 31)),
    "t5-float16": (
        ops.t5_relative_bias,
        (randn(9, 3, dtype=F16), positions(4, count=17), positions(0, count=63), 63, 31),
    ),
    "t5-float64": (ops.t5_relative_bias, (randn(2, 1, dtype=F64), positions(4, count=1), positions(0, count=1), 1)),
    "distance": (ops.distance_bias, (randn(3, 9), positions(4, 60, count=17), positions(0, 2, count=63), 63)),
    "distance-float16": (ops.distance_bias, (randn(3, 9, dtype=F16), positions(4, count=1), None, 63)),
    "fire": (
        ops.fire_bias,
        (positions(4, 60, count=5), positions(0, 2, count=17), randn(2), randn(8, 1), randn(8), randn(3, 8), randn(3)),
    ),
    "band": (ops.relative_band, (randn(12, 3), 20, 8)),
    "band-float16": (ops.relative_band, (randn(32, 2, dtype=F16),)),
    "encoder": (ops.encoder_attention, (*encoder_arguments(3, 17)[:4], randn(1, 3, 8, 48), 3, 0.5)),
    "encoder-one-token-float16": (
        ops.encoder_attention,
        (*encoder_arguments(1, 1, F16)[:4], randn(1, 3, 8, 48, dtype=F16), 3, 0.5),
    ),
    "encoder-float64": (
        ops.encoder_attention,
        (*encoder_arguments(2, 9, F64)[:4], randn(1, 3, 2, 8, dtype=F64), 3, 1.0),
    ),
    "cross-first": (ops.cross_attention, (*cross_arguments(3, 5, 11, True), 3, 0.5)),
    "cross-first-float16": (ops.cross_attention, (*cross_arguments(1, 1, 1, True, F16), 3, 0.5)),
    "cross-later": (ops.cross_attention, (*cross_arguments(2, 1, 11, False), 3, 0.5)),
    "cross-later-float64": (ops.cross_attention, (*cross_arguments(1, 4, 7, False, F64), 3, 0.5)),
    "t5-compact": (ops.t5_relative_bias, (randn(32, 3), positions(4, 60, count=1), None, 61)),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_registration_fake_kernel_and_gradient_formula_hold_together(case: str) -> None:
    operator, args = OPCHECKS[case]
    given = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    result = torch.library.opcheck(operator.overload, tuple(given), test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_among_the_cases() -> None:
    names = {"alibi_bias", "cached_attention", "distance_bias", "fire_bias", "masked_attention", "rotary_embedding"}
    names |= {"cross_attention", "encoder_attention", "relative_band", "t5_relative_bias"}
    assert set(ops.operators()) == names
    assert {operator.name for operator, _ in OPCHECKS.values()} == names
    assert set(ops.translation_table()) == {getattr(torch.ops.pe_onnx, name).default for name in names}
