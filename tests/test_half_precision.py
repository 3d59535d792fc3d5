"""Float16 and bfloat16: ``cuda.onnx``, the graph that CUDA sessions run, and the proof of what no CPU runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import t5_models
import tiny_models
import torch
from conftest import Bundles
from graphs import counts, host_numbers_on_a_device

import pe_onnx
from pe_onnx import discovery, verification
from pe_onnx.bundle import CUDA, MODEL, RUNTIME, read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ExportError, ProviderError
from pe_onnx.kv_cache import make_cache
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.half_precision import round_weights
from pe_onnx.passes.whole_bias import WholeBias
from pe_onnx.session import Session
from pe_onnx.tolerance import PROOF, PROOF_OF_BF16, tolerance_for

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPED = {"num_key_value_heads": 2}
Array = np.ndarray[Any, Any]


def half(bundles: Bundles, encoding: str, dtype: str = "fp16") -> Path:
    return bundles(encoding, "ort", dtype=dtype, config=GROUPED)


def runs(session: Session) -> list[Array]:
    """A ragged batch, its steps past T5's farthest bucket, and a prompt in chunks."""
    rng = np.random.default_rng(0)
    cache = make_cache(session, 3, 200)
    made = cache.prefill([rng.integers(0, 256, n).tolist() for n in (3, 150, 31)])
    for _ in range(5):
        made += list(cache.decode(rng.integers(0, 256, 3)).copy())
    cache = make_cache(session, 1, 200, chunk_tokens=48)
    made += cache.prefill([rng.integers(0, 256, 170).tolist()])
    return made


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("none", False),
        ("alibi_falcon", False),
        ("alibi", True),
        ("rope", True),
        ("rope_interleaved", True),
        ("t5_bias", True),
    ],
)
def test_the_graph_for_cuda(bundles: Bundles, encoding: str, written: bool) -> None:
    folder = half(bundles, encoding)
    assert (folder / CUDA).exists() == written
    assert not (folder / RUNTIME).exists()
    if not written:
        return
    bundle, made = read_bundle(folder), counts(ir.load(folder / CUDA))
    assert made["T5RelativeBias"] == made["RotaryEmbedding"] == 0
    want, have = (np.stack(runs(Session(bundle, graph=name, threads=1))) for name in (MODEL, CUDA))
    assert np.ptp(want) > 1
    np.testing.assert_allclose(have, want, atol=tolerance_for("fp16", bundle.depth).error * want.std())


@pytest.mark.parametrize("encoding", ["t5_bias", "t5_bias_per_layer", "kerple_log", "kerple_power"])
def test_biases_of_fixed_shapes_are_the_same_numbers(bundles: Bundles, encoding: str, tmp_path: Path) -> None:
    folder = bundles(encoding, "ort")
    model, made = ir.load(folder / MODEL), WholeBias()
    before = counts(model)
    made(model)
    assert made.replaced == before["T5RelativeBias"] + before["DistanceBias"] > 0
    after = counts(model)
    assert after["T5RelativeBias"] == after["DistanceBias"] == 0
    assert not {"T5RelativeBias", "DistanceBias"} & {function.name for function in model.functions.values()}
    copy = shutil.copytree(folder, tmp_path / "copy")
    ir.save(model, copy / "other.onnx")
    bundle = read_bundle(copy, verify=False)
    have, want = (runs(Session(bundle, graph=name, threads=1)) for name in ("other.onnx", MODEL))
    np.testing.assert_array_equal(np.stack(have), np.stack(want))


@pytest.mark.parametrize("encoding", ["none", "rope", "alibi", "rope_yarn"])
def test_other_biases_stay(bundles: Bundles, encoding: str) -> None:
    model, made = ir.load(bundles(encoding, "ort") / MODEL), WholeBias()
    assert not made(model).modified
    assert made.replaced == 0


RECORDED = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi", "kerple_log")


@pytest.mark.parametrize(
    "encoding",
    [
        *RECORDED,
        *(pytest.param(name, marks=pytest.mark.slow) for name in discovery.names("encodings") if name not in RECORDED),
    ],
)
def test_the_size_of_a_run_is_never_handed_to_a_device(bundles: Bundles, encoding: str) -> None:
    bundle = read_bundle(half(bundles, encoding))
    assert host_numbers_on_a_device(onnx.load(str(bundle.folder / bundle.graph_on("cuda")))) == []


def test_where_it_is_that_is_found(bundles: Bundles) -> None:
    """T5's bias as the CPU has it slices and repeats by sizes that are read off positions."""
    model = onnx.load(str(half(bundles, "t5_bias") / MODEL))
    assert any("Min" in found or "Sub" in found or "Where" in found for found in host_numbers_on_a_device(model))


# ------------------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("encoding", ["rope", "t5_bias", "alibi"])
def test_bfloat16_is_proven_in_float32(bundles: Bundles, encoding: str) -> None:
    """The proof's graphs, which are gone when it is over, are those of the bundle with weights widened: from PyTorch
    with the weights rounded they are float32's distance apart."""
    folder = half(bundles, encoding, "bf16")
    bundle = read_bundle(folder)
    assert bundle.manifest["proof"]["verified"]
    assert bundle.manifest["proof"]["relative_error"] < 2e-5
    assert bundle.manifest["proof"]["allowed"] == PROOF_OF_BF16 * PROOF * tolerance_for("bf16", bundle.depth).error
    decoder = Decoder(DecoderConfig.from_dict(bundle.manifest["source"]["config"])).eval()
    for parameter in decoder.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = np.random.default_rng(0).integers(0, 256, 60)
    from pe_onnx.models.exportable import PlainDecoder

    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        want = PlainDecoder(decoder)(tokens, torch.ones_like(tokens), torch.arange(60)[None])[0, -1].numpy()
    with verification.runnable(bundle) as other:
        place = other.folder
        for graph in (MODEL, CUDA):
            have = make_cache(Session(other, graph=graph, threads=1), 1, 60).prefill([ids.tolist()])[0]
            assert np.abs(have - want).max() < 2e-4 * want.std()
    assert not place.exists()


@pytest.mark.parametrize("preset", ["tiny", None], ids=["random", "trained"])
def test_a_wrong_graph_in_bfloat16_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    """The trained decoder hardly minds how its scores are scaled."""
    from pe_onnx.passes.widened import Widened

    call = Widened.call

    def scaled(self: Widened, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type in ("CachedAttention", "GroupQueryAttention"):
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
        return call(self, model)

    monkeypatch.setattr(Widened, "call", scaled)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        pe_onnx.export(encoding="rope", preset=preset, output=tmp_path / "b", dtype="bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "error"), [("llama", 2e-5), ("gpt2", 1e-3), ("t5", 2e-2)])
def test_checkpoints_in_bfloat16(family: str, error: float, tmp_path: Path) -> None:
    """Their weights are no numbers of bfloat16; those of the exported graph are, and of the reference. Constants that
    are rounded in the graph alone are GELU's, and the factor before T5's tied head."""
    build = t5_models.build if family in t5_models.VARIANTS else tiny_models.build
    build(family).save_pretrained(tmp_path / "checkpoint")
    bundle = pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b", dtype="bf16")
    assert bundle.manifest["proof"]["relative_error"] < error


def test_weights_are_rounded_where_they_are_not_round() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    for parameter in model[1].parameters():
        parameter.data.fill_(0.5)
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    for dtype in ("fp32", "fp16"):
        round_weights(model, dtype)
        assert all(parameter.data_ptr() == held[name].data_ptr() for name, parameter in model.named_parameters())
    round_weights(model, "bf16")
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() == held[name].data_ptr()) == name.startswith("1.")
        torch.testing.assert_close(parameter.data, held[name].bfloat16().float(), rtol=0, atol=0)


def test_bfloat16_weights_beside_the_graph(tmp_path: Path) -> None:
    """More than a megabyte: the file holds two bytes a weight, and the widened one of the proof is gone."""
    made = pe_onnx.export(encoding="rope", output=tmp_path / "b", dtype="bf16", config={"vocab_size": 12288})
    size = (tmp_path / "b" / "model.onnx.data").stat().st_size
    assert 2 * 2 * 12288 * 64 < size < 2.2 * 2 * 12288 * 64
    assert made.manifest["proof"]["verified"]
    assert {x.name for x in tmp_path.iterdir()} == {"b"}
    assert made.cache_bytes_per_token == 2 * 2 * 2 * 64


def test_the_cpu_does_not_take_bfloat16(bundles: Bundles) -> None:
    with pytest.raises(ProviderError, match=r"no kernels for bfloat16 on the CPU.*--provider cuda"):
        pe_onnx.load(half(bundles, "rope", "bf16"))


def test_a_weight_that_bfloat16_holds_and_float16_does_not(tmp_path: Path) -> None:
    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(1e5 * torch.eye(16) + torch.arange(16) % 3)

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            x = self.table[input_ids]
            key = x.reshape(*x.shape[:2], 1, 16).transpose(1, 2)
            (past, value) = past_key_values[0]
            return x * 1e-5 + attention_mask[:, -x.shape[1] :, None] * 0 + position_ids[..., None] * 0, [
                (torch.cat((past, key), 2), torch.cat((value, key), 2))
            ]

    sizes = {"layers": 1, "kv_heads": 1, "head_size": 16, "target": "portable"}
    with pytest.raises(Exception, match="dtype = 'fp16' cannot hold"):
        pe_onnx.export(Large(), tmp_path / "a", dtype="fp16", **sizes)
    pe_onnx.export(Large(), tmp_path / "b", dtype="bf16", **sizes)
