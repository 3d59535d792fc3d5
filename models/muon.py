"""Muon: momentum whose matrices are made orthogonal, so that every direction of a weight moves alike.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the five Newton-Schulz steps and
the coefficients given there::

    M <- m M + (1 - m) G,    U = (1 - m) G + m M,    W <- W - lr sqrt(max(1, rows / columns)) orthogonal(U)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices; vectors and embeddings are another optimizer's.

    lr: the greatest singular value, about, of a square matrix's step.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each matrix by its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                rows, columns = parameter.shape
                parameter.sub_(orthogonal(update), alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of a matrix U S V^T: its singular values go to between 0.7 and 1.2."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
