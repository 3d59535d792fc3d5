"""RMS norms of transformers: replaced by PyTorch's where they compute it, left alone where they do not."""

from __future__ import annotations

import pytest
import torch
from op_inputs import randn
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pe_onnx.models.norms import prove_norms
from pe_onnx.models.substitution import installed

SIZE = 24
EPS = 1e-5
SCALES = torch.tensor([100.0, 1.0, 1e-2, EPS**0.5, 1e-4])[:, None]
"""Of the rows: for the last two eps is most of the divisor."""

WEIGHTED: list[type[nn.Module]] = [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, GptOssRMSNorm, T5LayerNorm]
PLUS_ONE: list[type[nn.Module]] = [GemmaRMSNorm, Gemma3RMSNorm]


def norm(kind: type[nn.Module]) -> nn.Module:
    """With a drawn weight, inside a model."""
    module = kind(SIZE, eps=EPS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    return module


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Zhang and Sennrich's formula in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@torch.no_grad()
@pytest.mark.parametrize("kind", WEIGHTED + PLUS_ONE)
def test_replaced_and_equal(kind: type[nn.Module]) -> None:
    module = norm(kind)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), module)
    found = prove_norms(model)
    assert [s.owner for s in found] == [module]
    x = randn(3, 5, SIZE) * SCALES
    want = module(x)
    with installed(found):
        assert "forward" in vars(module)
        have = module(x)
    assert "forward" not in vars(module)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    weight = module.weight + (kind in PLUS_ONE)
    torch.testing.assert_close(have.double(), plain(x, weight), rtol=1e-5, atol=1e-6)
    assert (plain(x, module.weight) - plain(x, module.weight + 1)).abs().max() > 0.1  # Gemma's is told apart


@torch.no_grad()
def test_the_weight_is_read_when_it_is_run() -> None:
    """The exporter must see the parameter, not a copy of it."""
    module = norm(LlamaRMSNorm)
    (substitution,) = prove_norms(module)
    x = randn(1, SIZE)
    before = substitution.replacement(x)
    module.weight.mul_(2)
    torch.testing.assert_close(substitution.replacement(x), 2 * before)


class DoctoredNorm(LlamaRMSNorm):
    """``variance_epsilon`` says EPS; what is computed hangs on ``kind``."""

    kind = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "other eps":
            return self._with(x, EPS / 10)
        if self.kind == "mean subtracted":
            x = x - x.mean(-1, keepdim=True)
        y = self._with(x, EPS)
        return y + 1e-3 if self.kind == "constant added" else y

    def _with(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weight


def doctored(kind: str) -> nn.Module:
    module = norm(DoctoredNorm)
    module.kind = kind
    if kind == "a bias":
        module.bias = nn.Parameter(torch.zeros(SIZE))
    if kind == "a child":
        module.child = nn.Linear(1, 1)
    if kind == "no weight":
        module.weight = None
    if kind == "eps under another name":
        del module.variance_epsilon
    if kind == "weight of two axes":
        module.weight = nn.Parameter(torch.ones(1, SIZE))
    return module


DOCTORED = [
    "other eps",
    "mean subtracted",
    "constant added",
    "a bias",
    "a child",
    "no weight",
    "eps under another name",
    "weight of two axes",
]


@pytest.fixture(autouse=True)
def of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DoctoredNorm, "__module__", "transformers.models.doctored")


@pytest.mark.parametrize("kind", DOCTORED)
def test_a_doctored_norm_is_left_alone(kind: str) -> None:
    assert prove_norms(doctored(kind)) == []


def test_undoctored_it_is_replaced() -> None:
    assert len(prove_norms(doctored(""))) == 1


def test_a_norm_of_someone_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DoctoredNorm, "__module__", "somewhere.modeling")
    assert prove_norms(doctored("")) == []


@pytest.mark.parametrize("kind", [CohereLayerNorm, NemotronLayerNorm1P])
def test_layer_norms_are_left_alone(kind: type[nn.Module]) -> None:
    assert prove_norms(norm(kind)) == []


@pytest.mark.parametrize("module", [OlmoLayerNorm(SIZE), NanoChatRMSNorm(EPS), nn.LayerNorm(SIZE), nn.RMSNorm(SIZE)])
def test_norms_without_a_weight_and_those_of_pytorch_are_left_alone(module: nn.Module) -> None:
    assert prove_norms(module) == []
