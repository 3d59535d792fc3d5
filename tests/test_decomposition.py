"""Programs that are decomposed in place give the graph that PyTorch's own decomposition gives, or are left to it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from pe_onnx.custom_ops import OPSET
from pe_onnx.decomposition import without_tracing


class Simple(nn.Module):
    """Casts in three ways, one of them to the type that is there, logical operators, a constant, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        near = (n > 1) & (n < 5) | (n == torch.tensor(7))
        x = torch.where(near, self.linear(x.to(torch.float32)), x.to("cpu"))
        return x.float().T, n.to(x), near.to(device="cpu", dtype=torch.int32)


class Writing(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor]:
        total = torch.zeros(()).to(torch.float32)
        total += x.sum()
        return (total + n,)


class Shrinking(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor]:
        return (nn.functional.softshrink(x) * n.to(x.dtype),)


class Turning(nn.Module):
    """NumPy's transpose of four axes: neither in ONNX nor in the table of decompositions."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor]:
        return (x[None, None].T + n.T[:, :, None, None],)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cond(n.sum() > 3, lambda x: x.sin(), lambda x: x.cos(), (x,)),)


X, N = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 2, 5, 7]] * 3)
DYNAMIC = {"x": {0: torch.export.Dim.DYNAMIC}, "n": {0: torch.export.Dim.DYNAMIC}}


def translated(module: nn.Module, in_place: bool) -> tuple[ir.Model, list[torch.fx.Node]]:
    program = torch.export.export(module.eval(), (X, N), dynamic_shapes=DYNAMIC, strict=False)

    def translate() -> Any:
        return torch.onnx.export(program, opset_version=OPSET, dynamo=True, optimize=False, verbose=False)

    result = without_tracing(program, translate) if in_place else translate()
    assert result is not None
    assert result.exported_program is not None
    same = result.exported_program is program
    assert not same or in_place
    return result.model, list(program.graph.nodes) if same else []


def run(model: ir.Model) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    outputs = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), (X, N), strict=True)})
    return [torch.from_numpy(x) for x in outputs]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_the_graph_is_that_of_pytorch() -> None:
    module = Simple()
    (ours, nodes), (theirs, _) = translated(module, True), translated(module, False)
    assert nodes, "the program was traced anew"
    assert operators(ours) == operators(theirs)
    wanted = module(X, N)
    for model in (ours, theirs):
        for have, want in zip(run(model), wanted, strict=True):
            assert have.dtype == want.dtype
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize(
    "module", [Writing(), Shrinking(), Turning(), Branching()], ids=lambda module: type(module).__name__
)
def test_what_takes_more_is_left_to_pytorch(module: nn.Module) -> None:
    model, nodes = translated(module, True)
    assert not nodes
    torch.testing.assert_close(run(model)[0], module.eval()(X, N)[0])
