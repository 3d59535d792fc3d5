"""The operators distance_bias and fire_bias: formula, gradient, and their ONNX functions in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from pe_onnx.custom_ops import distance_bias, fire_bias, translation_table

H, M = 3, 8
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [
    (7, 1, 1, 9),
    (1, 1, 1, 1),
    (9, 1, 1, 9),
    (20, 1, 1, 4),
    (7, 1, 5, 9),
    (7, 2, 1, 9),
    (63, 3, 5, 63),
]
"""N, B, T, S: one row and one query (a slice), one row, several; distances beyond the last one."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def distance_inputs(N: int, B: int, T: int, S: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(N + B + T + S)
    return draw(H, N), torch.randint(0, S, (B, T), generator=generator), torch.arange(S).repeat(B, 1)


def fire_inputs(N: int, B: int, T: int, S: int) -> tuple[torch.Tensor, ...]:
    _, queries, keys = distance_inputs(N, B, T, S)
    return queries, keys, torch.tensor([0.3, 4.5]), draw(M, 1), draw(M), draw(H, M), draw(H)


class Consecutive(torch.nn.Module):
    def forward(self, table: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return distance_bias(table, queries, None, keys.shape[1])


class Explicit(torch.nn.Module):
    def forward(self, table: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return distance_bias(table, queries, keys, keys.shape[1])


class Fire(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return fire_bias(*inputs)


CASES: dict[str, tuple[type[torch.nn.Module], Callable[..., tuple[torch.Tensor, ...]], str]] = {
    "consecutive": (Consecutive, distance_inputs, "DistanceBias"),
    "explicit": (Explicit, distance_inputs, "DistanceBias"),
    "fire": (Fire, fire_inputs, "FireBias"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    dynamic = torch.export.Dim.DYNAMIC
    for name, (module, inputs, _) in CASES.items():
        args = inputs(7, 2, 3, 11)
        grid = {0: dynamic, 1: dynamic}
        shapes: Any = ({1: dynamic}, grid, grid) if len(args) == 3 else ((grid, grid, *[None] * 5),)
        path = tmp_path_factory.mktemp("ops") / f"{name}.onnx"
        program = torch.onnx.export(
            module().eval(),
            args,
            dynamo=True,
            opset_version=23,
            dynamic_shapes=shapes,
            custom_translation_table=translation_table(),
            verbose=False,
        )
        assert program is not None
        program.save(path)
        made[name] = path
    return made


def naive_distance(table: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    out = np.zeros((len(queries), H, queries.shape[1], keys.shape[1]))
    for b, h, i, j in np.ndindex(*out.shape):
        d = int(queries[b, i] - keys[b, j])
        out[b, h, i, j] = table[h, min(max(d, 0), table.shape[1] - 1)]
    return out


def naive_fire(queries: torch.Tensor, keys: torch.Tensor, *weights: torch.Tensor) -> np.ndarray:
    (c, L), w1, b1, w2, b2 = (x.double().numpy() for x in weights)
    out = np.zeros((len(queries), H, queries.shape[1], keys.shape[1]))
    for b, i, j in np.ndindex(len(queries), queries.shape[1], keys.shape[1]):
        q, d = int(queries[b, i]), max(int(queries[b, i] - keys[b, j]), 0)
        x = np.log(c * d + 1) / np.log(c * max(q, L) + 1)
        out[b, :, i, j] = w2 @ np.maximum(w1[:, 0] * x + b1, 0) + b2
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_formula_and_function_are_the_plain_loops(models: dict[str, Path], case: str, shape: Shape) -> None:
    module, inputs, _ = CASES[case]
    args = inputs(*shape)
    want = naive_fire(*args) if case == "fire" else naive_distance(*args)
    tolerance = 1e-5 if case == "fire" else 0.0
    np.testing.assert_allclose(module()(*args), want, atol=tolerance, rtol=tolerance)
    session = onnxruntime.InferenceSession(models[case], providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
    got = session.run(None, feeds)[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
    if shape[1] > 1 or case == "fire":  # the reference evaluator too; its Pad has no negative pads
        reference = ReferenceEvaluator(str(models[case])).run(None, feeds)[0]
        np.testing.assert_allclose(reference, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_a_function_with_a_body(models: dict[str, Path], case: str) -> None:
    model = onnx.load(models[case])
    assert [(f.domain, f.name) for f in model.functions] == [("pe_onnx", CASES[case][2])]
    assert [n.op_type for n in model.graph.node].count(CASES[case][2]) == 1
    assert len(model.functions[0].node) > 5


@pytest.mark.parametrize("case", CASES)
def test_the_fake_kernel_and_the_gradient(case: str) -> None:
    _, inputs, _ = CASES[case]
    args = list(inputs(6, 2, 3, 7))
    if case == "consecutive":
        args[2] = None  # type: ignore[call-overload]
    if case != "fire":
        args.append(7)  # type: ignore[arg-type]
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    operator = fire_bias if case == "fire" else distance_bias
    torch.library.opcheck(operator.overload, tuple(args), test_utils=("test_schema", "test_faketensor"))
    weights = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    upstream = draw(2, H, 3, 7)
    got = torch.autograd.grad((operator(*args) * upstream).sum(), weights)
    want = torch.autograd.grad((operator.formula(*args) * upstream).sum(), weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_float32_distances(dtype: torch.dtype) -> None:
    """float16 counts no distance beyond 2048: only the weights and the result are rounded."""
    queries, keys = torch.tensor([[70_000]]), torch.tensor([[0, 5, 67_951, 67_952, 69_999]])
    weights = [torch.tensor([0.25, 512.0]), draw(M, 1), draw(M), draw(H, M), draw(H)]
    half = [x.to(dtype) for x in weights]
    got = fire_bias(queries, keys, *half)
    assert got.dtype == dtype
    want = fire_bias(queries, keys, *(x.float() for x in half)).to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
