"""How far a bundle of a dtype may be from PyTorch: the one table."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """What a bundle of a dtype may differ by."""

    error: float
    """Greatest absolute error of a logit, relative to the spread (standard deviation) of the reference's logits."""
    top1: float
    """Least share of positions with the same most likely token, near-ties counted as the same."""
    near_tie: float
    """Two tokens are nearly tied whose reference logits differ by less than this, relative to the spread."""


TOLERANCES = {"fp32": Tolerance(5e-5, 1.0, 1e-5), "fp16": Tolerance(3e-2, 0.99, 1e-3)}
"""float32: rounding through 30 layers; float16: weights and activations of 11 bits."""

PROOF = 2.0
"""The proof at export allows this many times ``error``: its few tokens have a spread of their own."""
