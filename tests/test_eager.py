"""PyTorch's side of a bench: which model it is, and what of it is run."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from conftest import Bundles

import pe_onnx
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.eager import PlainContestant, TransformersContestant, eager
from pe_onnx.errors import ConfigError

FACTOR = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    return checkpoints.write(tmp_path_factory.mktemp("c") / "llama", "llama", rope_parameters=rope)


@pytest.fixture(scope="module")
def scaled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the checkpoint at four times its length."""
    output = tmp_path_factory.mktemp("b") / "bundle"
    return pe_onnx.export(model=folder, output=output, rope_scaling=f"linear:factor={FACTOR}", verify=False)


def of_transformers(kind: str) -> Any:
    """Small models of transformers: one that decodes, and one that has an encoder too."""
    if kind == "decoder":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    )


def test_logits_are_those_of_the_last_token(bundles: Bundles) -> None:
    """As a bundle's are: a prompt's prefill would pay for the others."""
    bundle = read_bundle(bundles("rope"))
    plain = eager(bundle, None, "torch", 0, None)
    assert isinstance(plain, PlainContestant)
    with torch.no_grad():
        last = plain._run([1, 2, 3], 0, ())[0]
        _, past = plain._run([1, 2], 0, ())
        torch.testing.assert_close(last, plain._run([3], 2, past)[0])
    assert last.shape == (1, 1, bundle.shape["vocab_size"])


def test_a_timed_step_does_not_look_at_signatures(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    contestant = eager(read_bundle(bundles("rope")), of_transformers("decoder"), "torch", 0, None)
    contestant.begin(8)
    monkeypatch.setattr("pe_onnx.eager.inspect.signature", _no_signature)
    contestant.step()
    contestant.first_token([1, 2, 3])


def _no_signature(function: Any) -> Any:
    caller = sys._getframe(1).f_globals["__name__"]
    assert not caller.startswith("pe_onnx"), "a signature is looked at while the clock runs"
    return signature(function)


@pytest.mark.parametrize("reference", [None, "checkpoint"])
def test_a_checkpoint_is_scaled_as_the_bundle_was(reference: str | None, folder: Path, scaled: Bundle) -> None:
    """Wherever it lies."""
    contestant = eager(scaled, None if reference is None else folder, "torch", 0, None)
    assert isinstance(contestant, TransformersContestant)
    rope = contestant.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", FACTOR)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (torch.nn.Linear(2, 2), "reference = Linear"),
        (torch.nn.Identity().forward, "reference = method"),
        (of_transformers("encoder-decoder"), "is an encoder-decoder, the bundle is of a decoder"),
    ],
    ids=["module", "function", "encoder-decoder"],
)
def test_what_has_no_cache_that_is_known_is_refused(reference: Any, words: str, bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        eager(read_bundle(bundles("rope")), reference, "torch", 0, None)
    assert "\n" not in str(error.value)


def test_a_decoder_beside_a_bundle_with_an_encoder_is_refused(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "crossing", "any")
    with pytest.raises(ConfigError, match="LlamaForCausalLM is a decoder, the bundle is of an encoder-decoder"):
        eager(read_bundle(bundles("rope")), of_transformers("decoder"), "torch", 0, None)
