"""What the encodings promise, on the exported graph in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pe_onnx.bundle import read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

Bundles = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 256, (1, 40))


def feeds(folder: Path, ids: np.ndarray, shift: int = 0, past: int = 0) -> dict[str, np.ndarray]:
    """Inputs for ``ids`` after ``past`` random cached tokens, positions shifted."""
    B, T = ids.shape
    rng = np.random.default_rng(1)
    values = {
        "input_ids": ids,
        "attention_mask": np.ones((B, past + T), np.int64),
        "position_ids": np.arange(past, past + T)[None].repeat(B, 0) + shift,
    }
    for i, (K, D) in enumerate(read_bundle(folder).caches):
        for kind in ("key", "value"):
            cached = rng.standard_normal((B, K, past, D), np.float32)
            values[f"past_key_values.{i}.{kind}"] = cached
    return values


def run(folder: Path, inputs: dict[str, np.ndarray], extra: str | None = None) -> dict[str, Any]:
    """All outputs by name, and the first output of the first node of operator type ``extra``."""
    model = onnx.load(folder / "model.onnx")
    names = [output.name for output in model.graph.output]
    if extra is not None:
        inner = next(node for node in model.graph.node if node.op_type == extra).output[0]
        model.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, None))
        names.append(inner)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    if extra is not None:
        outputs[extra] = outputs.pop(names[-1])
    return outputs


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_rope_scores_do_not_change_when_both_positions_shift(bundles: Bundles, target: str) -> None:
    folder = bundles("rope", target)
    logits = run(folder, feeds(folder, IDS))["logits"]
    shifted = run(folder, feeds(folder, IDS, shift=1000))["logits"]
    assert np.abs(shifted - logits).max() < 1e-5 * logits.std() * 10
    for encoding in ("learned", "sinusoidal"):  # absolute: they do change
        absolute = bundles(encoding, target)
        before, after = (run(absolute, feeds(absolute, IDS, shift=s))["logits"] for s in (0, 1000))
        assert np.abs(after - before).max() > 0.1 * before.std()


def test_rope_changes_when_one_position_shifts(bundles: Bundles) -> None:
    folder = bundles("rope", "ort")
    inputs = feeds(folder, IDS)
    logits = run(folder, inputs)["logits"]
    inputs["position_ids"] = inputs["position_ids"].copy()
    inputs["position_ids"][0, -1] += 1
    assert np.abs(run(folder, inputs)["logits"] - logits).max() > 1e-3 * logits.std()


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize(("encoding", "operator"), [("t5_bias", "T5RelativeBias"), ("alibi", "AlibiBias")])
def test_the_bias_depends_on_the_distance_alone(bundles: Bundles, encoding: str, operator: str, target: str) -> None:
    folder = bundles(encoding, target)
    by_distance: dict[int, np.ndarray] = {}
    for past, new in ((0, 33), (150, 1), (7, 20)):
        bias = run(folder, feeds(folder, IDS[:, :new], past=past), operator)[operator]  # [1, H, T, S]
        assert bias.shape == (1, 4, new, past + new)
        for i in range(new):
            for j in range(past + i + 1):
                value = by_distance.setdefault(past + i - j, bias[0, :, i, j])
                np.testing.assert_array_equal(value, bias[0, :, i, j])
    assert len(by_distance) == 151
    near, far = by_distance[1], by_distance[100]
    assert np.abs(near - far).min() > 1e-3
    if encoding == "alibi":
        assert (far < near).all()


@pytest.mark.parametrize("encoding", ["none", "learned", "sinusoidal", "rope", "t5_bias", "alibi"])
def test_cached_keys_do_not_change_when_a_token_is_added(bundles: Bundles, encoding: str) -> None:
    folder = bundles(encoding, "portable")
    short, long = (run(folder, feeds(folder, IDS[:, :n])) for n in (30, 31))
    for name, value in short.items():
        if name.startswith("present"):
            np.testing.assert_allclose(long[name][:, :, :30], value, atol=1e-5)
    step = feeds(folder, IDS[:, 30:31], past=30)
    for name, value in short.items():
        if name.startswith("present"):
            step[name.replace("present", "past_key_values")] = value
    stepped = run(folder, step)
    for name, value in short.items():
        if name.startswith("present"):
            np.testing.assert_array_equal(stepped[name][:, :, :30], value)
    np.testing.assert_allclose(stepped["logits"][:, -1], long["logits"][:, -1], atol=1e-4)


@pytest.mark.parametrize("encoding", ["none", "learned", "sinusoidal", "rope", "t5_bias", "alibi"])
def test_who_chased_whom(encoding: str) -> None:
    """Without a causal mask `none` sees a bag of words; every other encoding tells the sentences apart.

    T5 bias and ALiBi in their causal form count a later key as distance 0 or a negative one: still an order.
    """
    words = {word: i for i, word in enumerate(("the", "dog", "chased", "pig"))}
    sentences = ("the dog chased the pig", "the pig chased the dog")
    decoder = Decoder(DecoderConfig.preset("tiny", encoding=encoding))
    means = []
    for sentence in sentences:
        ids = torch.tensor([[words[word] for word in sentence.split()]])
        with torch.no_grad():
            step = PlainStep(torch.ones_like(ids), causal=False)
            means.append(decoder(ids, torch.arange(ids.shape[1])[None], step)[0].mean(0))
    difference = float((means[0] - means[1]).abs().max() / means[0].std())
    if encoding == "none":
        assert difference < 1e-5
    else:
        assert difference > 1e-2


def test_none_with_a_causal_mask_does_tell_them_apart() -> None:
    decoder = Decoder(DecoderConfig.preset("tiny", encoding="none"))
    with torch.no_grad():
        a, b = (
            decoder(ids, torch.arange(5)[None], PlainStep(torch.ones_like(ids)))[0].mean(0)
            for ids in (torch.tensor([[0, 1, 2, 0, 3]]), torch.tensor([[0, 3, 2, 0, 1]]))
        )
    assert float((a - b).abs().max() / a.std()) > 1e-2
