"""The two graphs of an encoder-decoder as optimum 2.1 reads them: what is named how, in which order, of which shape.

Its ``ORTDecoderForSeq2Seq`` hands the past over in the order of the inputs whose names hold ``.key`` or ``.value``,
and takes ``past_key_values`` to be, layer by layer, decoder key, decoder value, encoder key, encoder value.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import t5_models
from conftest import Bundles

LAYERS, H, D, C, V = 2, 3, 16, 48, 97
NAMES = [f"{i}.{part}.{kind}" for i in range(LAYERS) for part in ("decoder", "encoder") for kind in ("key", "value")]
Folders = dict[str, Path]
Array = np.ndarray


@pytest.fixture(scope="module")
def folders(t5_bundles: Bundles) -> Folders:
    """A model whose heads make up its width, and one with other heads."""
    changes = {"whole": {"eos_token_id": t5_models.ENDS}, "other": {"d_model": 64, "num_heads": 2, "d_kv": 24}}
    return {name: t5_bundles("flan_untied", "portable", **changed) for name, changed in changes.items()}


def values(session: onnxruntime.InferenceSession) -> tuple[dict[str, tuple], dict[str, tuple]]:
    return tuple({v.name: (v.type, v.shape) for v in part} for part in (session.get_inputs(), session.get_outputs()))


def opened(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])


def test_the_encoder(folders: Folders) -> None:
    inputs, outputs = values(opened(folders["whole"], "encoder_model.onnx"))
    source = ["batch_size", "encoder_sequence_length"]
    assert list(inputs.items()) == [
        ("input_ids", ("tensor(int64)", source)),
        ("attention_mask", ("tensor(int64)", source)),
    ]
    assert outputs == {"last_hidden_state": ("tensor(float)", [*source, C])}


@pytest.mark.parametrize("name", ["decoder_model.onnx", "decoder_model_merged.onnx"])
def test_the_decoder(name: str, folders: Folders) -> None:
    inputs, outputs = values(opened(folders["whole"], name))
    tokens = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "encoder_attention_mask": ["batch_size", "encoder_sequence_length"],
    }
    assert {key: inputs[key] for key in tokens} == {key: ("tensor(int64)", shape) for key, shape in tokens.items()}
    hidden = ["batch_size", "encoder_sequence_length", C]
    assert inputs["encoder_hidden_states"] == ("tensor(float)", hidden)
    assert [key for key in inputs if ".key" in key or ".value" in key] == [f"past_key_values.{n}" for n in NAMES]
    assert len(inputs) == 4 + len(NAMES), "neither use_cache_branch nor cache_position nor position_ids"
    assert list(outputs) == ["logits", *(f"present.{n}" for n in NAMES)]
    assert outputs["logits"] == ("tensor(float)", ["batch_size", "sequence_length", V])
    for n in NAMES:
        part = "encoder_" if "encoder" in n else ""
        assert inputs[f"past_key_values.{n}"][1] == ["batch_size", H, f"past_{part}sequence_length", D]
        present = "present_encoder_sequence_length" if part else "total_sequence_length"
        assert outputs[f"present.{n}"][1] == ["batch_size", H, present, D]


def test_the_merged_decoder_leaves_open_what_optimum_computes_otherwise(folders: Folders) -> None:
    """C / H = 32 at the first step, where the head size is 24."""
    assert (folders["whole"] / "decoder_model.onnx").read_bytes() == (
        folders["whole"] / "decoder_model_merged.onnx"
    ).read_bytes()
    sessions = [opened(folders["other"], name) for name in ("decoder_model.onnx", "decoder_model_merged.onnx")]
    (inputs, outputs), (open_inputs, open_outputs) = map(values, sessions)
    assert open_outputs == outputs
    pasts = [key for key in inputs if key.startswith("past_key_values")]
    assert {key: x for key, x in open_inputs.items() if key not in pasts} == {
        key: x for key, x in inputs.items() if key not in pasts
    }
    for key in pasts:
        assert inputs[key][1][3] == 24
        assert open_inputs[key] == (inputs[key][0], [*inputs[key][1][:3], "head_size"])
    rng = np.random.default_rng(0)
    first = steps(sessions[0], rng.standard_normal((2, 5, 64), np.float32), 24, 24)
    rng = np.random.default_rng(0)
    other = steps(sessions[1], rng.standard_normal((2, 5, 64), np.float32), 32, 24)
    for ours, theirs in zip(first, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(Exception, match="Got: 32 Expected: 24"):
        steps(sessions[0], rng.standard_normal((2, 5, 64), np.float32), 32, 24)


def steps(session: onnxruntime.InferenceSession, hidden: Array, dummy: int, size: int) -> list[Array]:
    """Logits of three steps as optimum takes them, the empty past of head size ``dummy``, presents of ``size``."""
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    past = {f"past_key_values.{n}": np.zeros((2, 2, 0, dummy), np.float32) for n in NAMES}
    logits = []
    for step in range(3):
        feeds = {
            "input_ids": np.array([[step + 4], [step + 9]]),
            "attention_mask": np.ones((2, step + 1), np.int64),
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
        }
        found = session.run(None, {**feeds, **past})
        logits.append(found[0])
        for n, present in zip(NAMES, found[1:], strict=True):
            if "decoder" in n or step == 0:
                assert present.shape[3] == size
                past[f"past_key_values.{n}"] = present
            else:
                assert present.shape[2] == 0, "the caller keeps the cross cache"
    return logits


def test_generation_config_holds_no_nulls(folders: Folders) -> None:
    """transformers 4.57 does not read ``early_stopping: null``, which 5.23 has in its to_dict()."""
    held = json.loads((folders["whole"] / "generation_config.json").read_text())
    assert None not in held.values()
    assert {key: held[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id")} == {
        "decoder_start_token_id": 0,
        "eos_token_id": t5_models.ENDS,
        "pad_token_id": 0,
    }
