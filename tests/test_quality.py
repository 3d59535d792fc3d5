"""What quantizing costs, and that right and wrong stay two questions: parity in floats, quality against PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx_ir as ir
import planted
import pytest
import t5_models
import tiny_models
import torch
from conftest import Bundles

import pe_onnx
from pe_onnx import reference as references
from pe_onnx.bisection import bisect
from pe_onnx.bundle import read_bundle
from pe_onnx.check_junit import to_junit
from pe_onnx.check_markdown import to_markdown
from pe_onnx.check_report import SCHEMA, CheckReport
from pe_onnx.checking import check
from pe_onnx.errors import CheckpointError, ConfigError, InputError
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder
from pe_onnx.parity import check_parity
from pe_onnx.quality import WEIGHT_FACTOR, measure_quality
from pe_onnx.quantization import quantize
from pe_onnx.rounded_module import round_weights
from pe_onnx.suite import Entry, read_suite

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "decoder.blocks.1.attention"


@pytest.fixture(scope="module")
def rope(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, with zero points."""
    return quantize(bundles("rope"), tmp_path_factory.mktemp("rope") / "q", symmetric=False, verify=False).folder


def checked(folder: Path, **options: Any) -> CheckReport:
    return check([folder], matrix=False, latency=False, tokens=40, **options)


def doubled_scales(name: str) -> planted.Fault:
    def fault(model: ir.Model) -> None:
        value = model.graph.initializers[f"{name}_scales"]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(2), name=value.name)

    return fault


def wrong_zeros(name: str) -> planted.Fault:
    def fault(model: ir.Model) -> None:
        value = model.graph.initializers[f"{name}_zero_points"]
        value.const_value = ir.Tensor(value.const_value.numpy() ^ 0x11, name=value.name)

    return fault


def encodings() -> list[Any]:
    six = ("rope", "t5_bias", "none", "learned", "sinusoidal", "alibi")
    return [
        pytest.param(name, bits, marks=() if (i, bits) in ((0, 8), (1, 4)) else pytest.mark.slow)
        for i, name in enumerate(six)
        for bits in (4, 8)
    ]


@pytest.mark.parametrize(("encoding", "bits"), encodings())
def test_every_encoding_passes(encoding: str, bits: int, bundles: Bundles, tmp_path: Path) -> None:
    quantize(bundles(encoding), tmp_path / "q", bits=bits)
    report = checked(tmp_path / "q")
    assert report.passed, report.verdict
    (found,) = report.checks
    assert found.parity is not None
    assert found.quality is not None
    assert max(mode["relative_error"] for mode in found.parity["modes"]) < 2e-5
    assert {finding.name for finding in found.of("quality")} == {"weights", "kl"}
    assert 0 < found.quality["kl"] < found.quality["limit"]["kl"]
    assert found.quality["kl"] > (1e-5 if bits == 8 else 1e-2)


CHECKPOINTS = ["opt", "bloom", "gpt2", "t5", "flan_untied"]


@pytest.mark.slow
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_checkpoints_pass(family: str, tmp_path: Path) -> None:
    """GPT-2 holds its weights turned, and BLOOM's and T5's heads are tied."""
    if family in t5_models.VARIANTS:
        t5_models.write(tmp_path / "c", family, d_ff=96)
    else:
        tiny_models.build(family).save_pretrained(tmp_path / "c")
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", verify=False)
    for bits in (4, 8):
        quantize(tmp_path / "b", tmp_path / f"q{bits}", bits=bits)
    report = check([tmp_path / "q4", tmp_path / "q8"], matrix=False, latency=False)
    assert report.passed, report.verdict
    assert all(found.quality is not None and found.quality["unit"] == "token" for found in report.checks)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["encoder.embed*", "*.lm_head.*"])
def test_a_tied_weight_that_one_graph_alone_rounds(pattern: str, tmp_path: Path) -> None:
    t5_models.write(tmp_path / "c", "t5", d_ff=96)
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", verify=False)
    quantize(tmp_path / "b", tmp_path / "q", exclude=[pattern], block=16)
    assert check_parity(tmp_path / "q", modes=["encoder", "whole"]).passed


# a fault, into which encoding and target
FAULTS: dict[str, tuple[planted.Fault, str, str]] = {
    "theta": (planted.theta(LAYER), "rope", "ort"),
    "slot": (planted.slot(LAYER, -1), "rope", "ort"),
    "half": (planted.half_table, "rope", "ort"),
    "mask": (planted.shifted_mask, "alibi", "portable"),
    "table": (planted.transposed_table("decoder.encoding.weight"), "t5_bias", "ort"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("theta", "half") else pytest.mark.slow) for n in FAULTS]
)
def test_a_fault_in_a_quantized_bundle_fails_parity_and_is_found(name: str, bundles: Bundles, tmp_path: Path) -> None:
    """Even a table that went through float16, whose error is far below that of rounding weights."""
    fault, encoding, target = FAULTS[name]
    quantize(bundles(encoding, target), tmp_path / "q", verify=False)
    wrong = planted.plant(tmp_path / "q", tmp_path / "wrong", fault)
    report = check_parity(wrong, modes=["whole"])
    assert report.relative_error > 2 * report.tolerance.error
    found = bisect(wrong)
    assert found is not None
    assert found.layer.startswith("decoder")
    if name in ("theta", "slot"):
        assert found.layer == LAYER


@pytest.mark.slow
def test_a_window_that_is_a_token_too_short_fails(tmp_path: Path) -> None:
    tiny_models.build("mistral").save_pretrained(tmp_path / "c")
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", verify=False)
    quantize(tmp_path / "b", tmp_path / "q", verify=False)
    assert check_parity(tmp_path / "q", modes=["whole", "steps"]).passed
    wrong = planted.plant(tmp_path / "q", tmp_path / "wrong", planted.shifted_window)
    assert not check_parity(wrong, modes=["whole"]).passed


@pytest.mark.parametrize(("fault", "kl_too"), [(doubled_scales, True), (wrong_zeros, False)])
def test_a_bad_rounding_passes_parity_and_fails_quality(rope: Path, fault: Any, kl_too: bool, tmp_path: Path) -> None:
    """Scales of one layer doubled, or its zero points wrong: the bundle computes rightly with wrong weights."""
    name = f"{LAYER}.o_proj.weight"
    wrong = planted.plant(rope, tmp_path / "wrong", fault(name))
    assert check_parity(wrong, modes=["whole"]).passed
    report = checked(wrong)
    assert not report.passed
    (found,) = report.checks
    bad = {finding.name for finding in found.failures}
    assert "weights" in bad
    assert found.quality is not None
    assert found.quality["worst_weight"]["name"] == name
    assert found.quality["worst_weight"]["error"] > 1.5 * WEIGHT_FACTOR * found.quality["worst_weight"]["expected"]
    if kl_too:
        right = measure_quality(rope)
        assert found.quality["kl"] > 2 * right.kl


def test_the_figures_are_those_of_a_plain_computation(rope: Path) -> None:
    """KL and bits of a module with the rounded weights in PyTorch: apart only by the rounding of activations."""
    bundle = read_bundle(rope)
    decoder = Decoder(references.DecoderConfig.from_dict(bundle.manifest["source"]["config"]))
    report = measure_quality(rope)
    text = np.frombuffer((Path(pe_onnx.__file__).parent / "quality.txt").read_bytes(), np.uint8).astype(np.int64)
    rows = torch.from_numpy(text[: 8 * 160].reshape(8, 160).copy())
    logs = []
    with torch.no_grad():
        for module in (PlainDecoder(decoder), None):
            module = module or PlainDecoder(round_weights(decoder, bundle))
            positions = torch.arange(160).expand(8, -1)
            logs.append(module(rows, torch.ones_like(rows), positions)[:, :-1].double().log_softmax(-1))
    p, q = logs
    kl = (p.exp() * (p - q)).sum(-1).mean()
    bits = [-x.gather(-1, rows[:, 1:, None]).mean() / np.log(2) for x in logs]
    assert report.tokens == report.units == 8 * 159
    assert report.kl == pytest.approx(float(kl), rel=0.1)
    assert report.reference_bits == pytest.approx(float(bits[0]), rel=1e-5)
    assert report.bits == pytest.approx(float(bits[1]), rel=0.01)


def test_the_reports_hold_it(rope: Path, bundles: Bundles, tmp_path: Path) -> None:
    report = check([rope, bundles("rope")], matrix=False, latency=False, tokens=40, modes=["whole"])
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(document)
    quantized, plain = document["checks"]
    assert quantized["quality"]["unit"] == "byte"
    assert plain["quality"] is None
    assert not [finding for finding in plain["findings"] if finding["part"] == "quality"]
    junit, markdown = to_junit(report), to_markdown(report)
    assert "quality: kl" in junit
    assert "bits_per_byte" in junit
    assert f"{quantized['quality']['bits']:.4g} a byte" in markdown
    assert "nats a token" in markdown


def test_limits_texts_and_switches(rope: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Ein anderer Text, mit Umlauten: äöü. " * 9, "utf-8")
    assert measure_quality(rope, text=text).on == str(text)
    report = checked(rope, max_kl=1e-6, text=text, modes=["whole"])
    (found,) = report.checks
    assert [finding.name for finding in found.failures] == ["kl"]
    assert "1e-06 is allowed" in found.failures[0].message
    entry = check([Entry(rope, max_kl=1e9)], max_kl=1e-6, matrix=False, latency=False, modes=["whole"], tokens=9)
    assert entry.passed
    left_out = checked(rope, quality=False, modes=["whole"])
    assert [(f.name, f.status) for f in left_out.checks[0].of("quality")] == [("quality", "skipped")]
    (tmp_path / "pe-onnx.toml").write_text(
        '[check]\nbundles = [{path = "q", max-kl = 0.5}]\ntext = "text"\nmax-kl = 1\n'
    )
    suite = read_suite(tmp_path / "pe-onnx.toml")
    assert (suite.max_kl, suite.text, suite.bundles[0].max_kl) == (1, text, 0.5)


def test_what_is_refused(rope: Path, bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not quantized"):
        measure_quality(bundles("rope"))
    with pytest.raises(ConfigError, match=r"max_kl = -1"):
        measure_quality(rope, max_kl=-1)
    (tmp_path / "short").write_text("a")
    with pytest.raises(InputError, match="shorter than two tokens"):
        measure_quality(rope, text=tmp_path / "short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        measure_quality(rope, text=tmp_path / "binary")
    with pytest.raises(ConfigError, match="text = "):
        checked(rope, text=tmp_path / "none")


def test_without_its_checkpoint_quality_is_skipped(rope: Path, tmp_path: Path) -> None:
    shutil.copytree(rope, tmp_path / "gone")
    manifest = json.loads((tmp_path / "gone" / "manifest.json").read_text())
    manifest["source"] = {"kind": "checkpoint", "path": str(tmp_path / "nowhere")}
    (tmp_path / "gone" / "manifest.json").write_text(json.dumps(manifest))
    (found,) = checked(tmp_path / "gone").checks
    (finding,) = found.of("quality")
    assert (finding.status, "is gone" in finding.message) == ("skipped", True)


def test_a_module_that_is_handed_in_stays_as_it_is(rope: Path) -> None:
    config = references.DecoderConfig.from_dict(read_bundle(rope).manifest["source"]["config"])
    module = PlainDecoder(Decoder(config))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert check_parity(rope, module, modes=["whole"]).passed
    assert measure_quality(rope, module).passed
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_another_models_module_is_refused(rope: Path) -> None:
    bundle = read_bundle(rope)
    config = bundle.manifest["source"]["config"]
    shallow = Decoder(references.DecoderConfig.from_dict({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"decoder\.blocks\.1\..* is no parameter of Decoder"):
        round_weights(shallow, bundle)
    wide = Decoder(references.DecoderConfig.from_dict({**config, "intermediate_size": 512}))
    with pytest.raises(CheckpointError, match="the reference is another model's"):
        round_weights(wide, bundle)
