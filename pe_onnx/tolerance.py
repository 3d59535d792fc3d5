"""How far a bundle may be from PyTorch: a rule of the dtype and the depth, not a number that was once enough.

Roundings are independent of each other, so that their sum grows with the square root of how many there are::

    error <= factor u sqrt(layers + fixed)        of the spread (standard deviation) of the reference's logits

u is the dtype's unit roundoff, 2^-24 of float32 and 2^-11 of float16. ``fixed`` stands for what is rounded once at any
depth: embedding and head, in float16 above all the head's weights and input, whose rounding shows in the logits as it
is.

A quantized bundle is held to the same with its rounded weights in PyTorch and products in floats
(``exact_options``). The kernels that users run round activations to int8: where a model has activations of enormous
size (SmolLM2-135M, on random tokens) one logit may be off by twice the spread, right as the kernels are, so that of
them the root mean square is held to the rule at export, u = 2^-8, and the KL divergence in a check (``kl_limit``).

The constants are measured (``benchmarks/tolerance.py``). The worst right bundles, in units of u: float32 59 at 2
layers (of 129 families, at the bridge's proof), 61 at 8 and 200 to 300 at 30 layers (SmolLM2-135M, by prompts); float16
9.1 at 2 layers and 20.5 at 30. Allowed is 286, 452 and 809, and 36 and 60: four times that or more, but for SmolLM2's
worst, 2.7 times in float32 and 2.9 in float16, because up to 32 layers the rule stays within the 5e-5 and 3e-2 that
have always been enough. A wrong theta, scale, mask or position is off by 1e-2 to 5: hundreds of times what float32 is
allowed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pe_onnx.errors import ConfigError

if TYPE_CHECKING:
    from pe_onnx.bundle import Bundle


class Rule(NamedTuple):
    """``factor u sqrt(layers + fixed)``, ``u = 2^-bits``."""

    bits: int
    """Of the significand, the one that is not stored included."""
    factor: float
    fixed: int
    """Roundings at any depth, counted as layers."""


RULES = {"fp32": Rule(24, 143.0, 2), "fp16": Rule(11, 9.0, 14), "bf16": Rule(8, 9.0, 14), "int8": Rule(8, 9.0, 14)}
"""By the dtype in which products are computed."""

KL_FACTOR, ACTIVATION = 3.2, 1.5
"""Of ``kl_limit``, and of int8 activations in blocks, relative to u."""
KL_RULE = (
    f"quantized: KL <= ({KL_FACTOR:g} e s)^2 / 2 nats a token, e what even steps of weights and int8 activations are "
    f"off by (root mean square), s the logits' spread"
)

PROOF = 2.0
"""The proof at export allows this many times ``error``: its few tokens have a spread of their own."""
PROOF_OF_BF16 = 0.25
"""As a share of what bfloat16 is allowed. No CPU computes in it: the proof at export does in float32, weights rounded
on both sides, and most bundles are float32's distance apart. What is left are constants of the graph that are rounded
(Nemotron's norms, T5's and Gemma's factors): 3.4e-2 at most of 130 families' tiny models, of 7.0e-2."""


class Tolerance(NamedTuple):
    """What a bundle may differ by."""

    error: float
    """Greatest absolute error of a logit, relative to the spread (standard deviation) of the reference's logits."""
    rule: str
    """How that was derived, one line."""

    @property
    def near_tie(self) -> float:
        """Two tokens are nearly tied whose reference logits differ by no more than this, relative to the spread: each
        of the two may have moved by ``error``."""
        return 2 * self.error


def unit_roundoff(dtype: str) -> float:
    """u, the greatest relative error of one rounding. dtype: ``fp32``, ``fp16`` or ``bf16``."""
    return 2.0 ** -RULES[dtype].bits


def tolerance_for(dtype: str, layers: int) -> Tolerance:
    """What a bundle is allowed. dtype: of its weights. layers: that a logit went through, an encoder's too."""
    bits, factor, fixed = RULES[dtype]
    error = factor * 2.0**-bits * math.sqrt(layers + fixed)
    derived = f"{dtype}: {factor:g} u sqrt({layers} layers + {fixed}), u = 2^-{bits}"
    return Tolerance(error, f"{derived}: {error:.1e} of the logits' spread")


LEAN = {"session.disable_prepacking": "1"}
"""onnxruntime's options of a session that runs a few times only: weights stay where they are mapped, and kernels take
them as they stand."""


def exact_options(bundle: Bundle) -> dict[str, str]:
    """onnxruntime's options of a session that is held to ``tolerance_for``: without prepacked weights those of few bits
    are written out and multiplied in floats, where the kernels that users run round activations to int8."""
    return {} if bundle.quantization is None else dict(LEAN)


def tolerance_of(bundle: Bundle) -> Tolerance:
    """What the kernels that users run are allowed, root mean square, from PyTorch with the bundle's rounded weights."""
    held = bundle.quantization or {}
    rounded = held.get("accuracy_level") == 4 or held.get("cache") == "int8"
    return tolerance_for("int8" if rounded else bundle.manifest["dtype"], bundle.depth)


class Limit(NamedTuple):
    """What rounding weights may cost."""

    kl: float
    """Mean KL divergence from PyTorch with the weights as they were, nats a token."""
    rule: str
    """How that was derived, one line."""


def kl_limit(bundle: Bundle, rounding: float, spread: float) -> Limit:
    """What a quantized bundle may cost.

    A weight that is off by e of its size moves what it makes by e, and the logits by about as much of their spread
    whatever the depth, since residual branches are small where there are many. Small moves d of the logits cost a KL
    divergence of half their variance::

        KL <= (factor e spread)^2 / 2      e^2 = rounding^2 + (activation u)^2

    rounding: root mean square of e over the weights, as even steps explain it. Activations in int8 have an e of their
    own, u = 2^-8. spread: standard deviation of the reference's logits.

    Measured, the factor is 1.3 to 1.8 for our decoder in six encodings, at 4 and at 8 bits, of 2 layers and of 8; 0.01
    to 1.4 for GPT-2, OPT, BLOOM and T5 with sharp random weights; 1.6 at 4 bits and 1.9 at 8 for SmolLM2-135M, whose
    KL is 0.41 and 0.0046 nats. Allowed is 3.2, 2.7 times the KL of the worst.
    """
    int8 = bundle.quantization is not None and bundle.quantization["accuracy_level"] == 4
    activation = ACTIVATION * 2.0**-8 if int8 else 0.0
    error = math.hypot(rounding, activation)
    kl = (KL_FACTOR * error * spread) ** 2 / 2
    derived = (
        f"({KL_FACTOR:g} e {spread:.3g})^2 / 2, e = {error:.3g} of weights{' and int8 activations' if int8 else ''}"
    )
    return Limit(kl, f"quantized: {derived}: {kl:.2g} nats a token")


def given_kl(kl: float) -> Limit:
    """A limit that someone chose. Raises ConfigError for what is no number from 0."""
    if not 0 <= kl < math.inf:
        raise ConfigError(f"max_kl = {kl} must be a finite number of nats, at least 0")
    return Limit(kl, f"given: {kl:.2g} nats a token")


def given(error: float) -> Tolerance:
    """A tolerance that someone chose. Raises ConfigError for what is no number from 0."""
    if not 0 <= error < math.inf:
        raise ConfigError(f"tolerance = {error} must be a finite number, at least 0")
    return Tolerance(error, f"given: {error:.1e} of the logits' spread")
