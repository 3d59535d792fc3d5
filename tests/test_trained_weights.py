"""The weights that come with the package: trained alike, good enough, exported by default, and nowhere by accident."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from conftest import Bundles, Cli

import pe_onnx
from pe_onnx import trained_weights
from pe_onnx.bundle import read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import CheckpointError, ConfigError
from pe_onnx.exporter import decoder_config
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.train import SHIPPED
from pe_onnx.models.training import Settings, bits_per_byte
from pe_onnx.parity import check_parity

LENGTH = 256
PROMPT = "And it came to pass "


def held_out() -> torch.Tensor:
    return torch.frombuffer(bytearray(trained_weights.held_out()), dtype=torch.uint8).long()


def trained(name: str, **changes: object) -> Decoder:
    return Decoder(decoder_config(name, **changes)[0])  # type: ignore[arg-type]


def test_all_were_trained_alike() -> None:
    assert trained_weights.names() == sorted(SHIPPED)
    logs = [trained_weights.log(name) for name in SHIPPED]
    for key in ("settings", "text", "torch"):
        assert len({json.dumps(log[key], sort_keys=True) for log in logs}) == 1
    assert logs[0]["settings"] == vars(Settings())
    for log in logs:
        log["config"].pop("encoding")
    assert len({json.dumps({**log["config"], "encoding_parameters": {}}, sort_keys=True) for log in logs}) == 1


def test_they_are_small() -> None:
    sizes = [path.stat().st_size for path in trained_weights.FOLDER.iterdir()]
    assert sum(sizes) < 20e6
    assert max(sizes) < 3e6


@pytest.mark.parametrize("name", SHIPPED)
def test_bits_per_byte_are_those_of_the_log(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some windows of all; with its positions in disorder a decoder that knows them needs far more."""
    decoder, log = trained(name), trained_weights.log(name)
    bits = bits_per_byte(decoder, held_out(), LENGTH, windows=64)
    assert bits == pytest.approx(log["losses"][-1][2], abs=2e-3)
    if name == "none":
        return
    assert bits < 2.3
    assert log["validation_bits_per_byte"] < 2.3
    hook, which = {"embed": ("embed", 0), "rotate": ("tables", 0), "bias": ("bias", 1)}[decoder.encoding.hook]
    right = getattr(decoder.encoding, hook)  # of a bias the keys' positions: to the queries' ALiBi is indifferent

    def disordered(*given: Any) -> Any:
        return right(*(x.flip(1) if i == which else x for i, x in enumerate(given)))

    monkeypatch.setattr(decoder.encoding, hook, disordered)
    assert bits_per_byte(decoder, held_out(), LENGTH, windows=8) > bits + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_bits_per_byte_of_all_that_is_held_out(name: str) -> None:
    log = trained_weights.log(name)
    assert bits_per_byte(trained(name), held_out(), LENGTH) == pytest.approx(log["validation_bits_per_byte"], abs=1e-3)


def test_it_is_the_default(bundles: Bundles) -> None:
    """And it speaks: most words of a continuation are words of the text that was held out."""
    bundle = bundles("rope", weights="rope")
    resolved, preset = decoder_config("rope")
    assert (resolved.weights, preset) == ("rope", None)
    assert read_bundle(bundle).manifest["source"]["config"] == resolved.to_dict()
    said = pe_onnx.load(bundle).generate(PROMPT, 160)
    tokens = list(PROMPT.encode())
    decoder = trained("rope")
    from pe_onnx.models.training import forward

    with torch.no_grad():
        while len(tokens) < len(PROMPT) + 160:
            tokens.append(int(forward(decoder, torch.tensor([tokens]))[0, -1].argmax()))
    assert list(PROMPT.encode()) + said.tokens == tokens
    known = set(trained_weights.held_out().decode().lower().replace(",", " ").replace(".", " ").split())
    words = said.text.lower().replace(",", " ").replace(".", " ").split()
    assert len(words) > 20
    assert sum(word in known for word in words[:-1]) > 0.8 * len(words)
    random = pe_onnx.load(bundles("rope")).generate(PROMPT, 160).text.split()
    assert sum(word.lower() in known for word in random) < 0.5 * len(words)


def test_parity_with_the_trained_decoder(bundles: Bundles) -> None:
    report = check_parity(bundles("learned", weights="learned"))
    assert report.passed
    assert "weights trained with learned" in report.reference


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, "rope"),
        ({"weights": "rope"}, "rope"),
        ({"preset": "tiny"}, None),
        ({"parameters": {"theta": 500000.0}}, None),
        ({"fields": {"num_hidden_layers": 1}}, None),
        ({"parameters": {"theta": 500000.0}, "weights": "rope"}, "rope"),
    ],
    ids=str,
)
def test_whose_weights(options: dict[str, object], weights: str | None) -> None:
    assert decoder_config("rope", **options)[0].weights == weights  # type: ignore[arg-type]


@pytest.mark.parametrize(("encoding", "better"), [("rope_linear", False), ("rope_ntk", True), ("rope_yarn", True)])
def test_a_variant_takes_the_weights(encoding: str, better: bool) -> None:
    """Without training interpolation alone makes it worse: neighbours are where it never saw them."""
    extended = trained(encoding, parameters={"factor": "4"}, weights="rope")
    assert extended.config.max_position_embeddings == 1024
    plain = trained("rope")
    for name, parameter in plain.named_parameters():
        assert torch.equal(extended.get_parameter(name), parameter)
    tokens = held_out()
    bits = [bits_per_byte(decoder, tokens, 1024, windows=2) for decoder in (extended, plain)]
    assert abs(bits[0] - bits[1]) > 0.3
    assert (bits[0] < bits[1]) == better


def test_yarn_knows_the_trained_length() -> None:
    """Its ramp is that of 256 tokens, given or not; dynamic scaling begins at the trained length."""
    parameters = {"factor": 4, "original_max_position_embeddings": 256}
    right = trained("rope_yarn", parameters=parameters, weights="rope").encoding
    for given, same in (({"factor": 4}, True), ({**parameters, "original_max_position_embeddings": 64}, False)):
        other = trained("rope_yarn", parameters=given, weights="rope").encoding
        assert torch.equal(other.inverse_frequency, right.inverse_frequency) == same
    assert trained("rope_dynamic", weights="rope").config.max_position_embeddings == 256


def test_other_weights_of_the_same_name(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("learned", weights="learned")
    shutil.copytree(trained_weights.FOLDER, tmp_path / "trained")
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path / "trained")
    check_parity(bundle)
    state = trained_weights.read("learned")
    trained_weights.write(tmp_path / "trained", "learned", {k: -v for k, v in state.items()}, {})
    with pytest.raises(CheckpointError, match="other weights 'learned' than the bundle was made with"):
        check_parity(bundle)


@pytest.mark.parametrize(
    ("encoding", "options", "words"),
    [
        ("alibi", {"weights": "rope"}, "were trained with a rotation of queries and keys"),
        ("rope", {"weights": "rop"}, "did you mean 'rope'"),
        ("rope", {"weights": "rope", "preset": "tiny"}, "is for random weights"),
        ("rope", {"weights": "rope", "fields": {"num_hidden_layers": 2}}, "is for random weights"),
        ("rope", {"fields": {"weights": "rope"}}, "has its own argument"),
        ("learned", {"weights": "learned", "fields": {"max_position_embeddings": 300}}, "do not fit this decoder"),
    ],
)
def test_what_does_not_belong_together_is_refused(encoding: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(encoding, **options)


def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained_weights.FOLDER, tmp_path / "trained")
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path / "trained")
    path = tmp_path / "trained/rope.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="safetensors cannot be read"):
        trained("rope")
    (tmp_path / "trained/rope.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trained("rope")


def test_the_names_need_no_pytorch() -> None:
    code = "import sys\nfrom pe_onnx import trained_weights as t\nt.names(); t.held_out(); t.config('rope')\n"
    code += "print(sorted({'torch', 'safetensors', 'transformers'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_fresh_start(run: Cli, cli: Cli, tmp_path: Path) -> None:
    """Two commands without a folder, a prompt or a download."""
    made = run("export", "--encoding", "alibi")
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith("bundle: alibi, trained weights, ort, fp32, 4.1 MB")
    said = cli("generate", "-n", "40", stdin="", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("In the beginning")
    assert len(said.stdout) == len("In the beginning") + 41
    assert cli("generate", "-n", "9", stdin="In the beginning\n", cwd=tmp_path).stdout == f"{said.stdout[16:25]}\n"
    refused(cli("generate", "bundle", stdin="", cwd=tmp_path), 2, "no prompt")
    shown = cli("inspect", "bundle", cwd=tmp_path)
    assert "weights trained with alibi" in " ".join(shown.stdout.split())
    refused(
        run("export", "--encoding", "rope", "--weights", "rope", "--preset", "tiny", "-o", "c"), 2, "random weights"
    )
    refused(run("export", "--model", "x", "--weights", "rope", "-o", "c"), 2, "--encoding")


def test_a_config_without_weights_is_random() -> None:
    """As bundles of before have it."""
    values = {k: v for k, v in DecoderConfig().to_dict().items() if k != "weights"}
    assert DecoderConfig.from_dict(values).weights is None
