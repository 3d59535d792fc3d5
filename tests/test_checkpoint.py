"""Checkpoints from disk: read whole, or refused with the weight or the reason that is in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import VOCAB
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration

import pe_onnx
from pe_onnx.errors import CheckpointError
from pe_onnx.models.checkpoint import load, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

K_PROJ = "model.layers.0.self_attn.k_proj.weight"
EXTRA = "model.layers.0.self_attn.extra.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "c", "llama", num_hidden_layers=1)


def rewrite(folder: Path, change: Callable[[Weights], object]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def test_every_weight_is_read(folder: Path) -> None:
    state = load(folder).model.state_dict()
    written = load_file(folder / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in written.items())
    assert all(x.dtype == torch.float32 for x in state.values())


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (lambda state: state.pop(K_PROJ), K_PROJ, "weights missing"),
        (lambda state: state.update({EXTRA: torch.zeros(16, 64)}), EXTRA, "weights not read by the model"),
        (
            lambda state: state.update({K_PROJ: torch.zeros(16, 64)}),
            f"{K_PROJ}: [16, 64] in the file, [32, 64] by ",
            "weights of another shape",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[Weights], object], name: str, reason: str, folder: Path, tmp_path: Path
) -> None:
    rewrite(folder, lambda state: None)
    load(folder)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        pe_onnx.export(model=folder, output=tmp_path / "b")
    assert f"{reason}: {name}" in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="the weights are truncated or damaged"):
        load(folder)


def test_weights_in_several_files(tmp_path: Path) -> None:
    whole = load_model(checkpoints.write(tmp_path / "whole", "llama")).state_dict()
    folder = checkpoints.write(tmp_path / "parts", "llama", max_shard_size="40KB")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 1
    state = load_model(folder).state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(x, state[name]) for name, x in whole.items())
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(folder)


def test_an_encoder_decoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCAB, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match="'bart' is an encoder-decoder; of these t5, mt5, umt5 only"):
        pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for path, reason in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "weights.bin", "must be a Hugging Face folder or a .gguf file"),
        (tmp_path, "it has no config.json"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load(path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"it holds 2 \.gguf files; name one"):
        load(tmp_path)


def test_no_tokenizer_is_made_up(tmp_path: Path) -> None:
    """Of a Gemma folder without tokenizer files transformers makes an empty tokenizer."""
    checkpoints.write(tmp_path / "c", "gemma", num_hidden_layers=1)
    loaded = load(tmp_path / "c")
    assert loaded.tokenizer is None
    loaded.write_assets(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


MASK = torch.ones(1, 1, 8, 8).tril()


@pytest.mark.parametrize(
    ("name", "saved", "let_through"),
    [
        ("transformer.h.0.attn.masked_bias", torch.tensor(-1e4), True),
        ("transformer.h.0.attn.bias", MASK, True),
        ("transformer.h.0.attn.attention.bias", MASK.bool(), True),
        ("transformer.h.0.attn.causal_mask", MASK, True),
        ("transformer.h.0.attn.masked_bias", torch.randn(64), False),
        ("transformer.h.0.attn.causal_mask", torch.randn(1, 1, 8, 8), False),
        ("transformer.h.0.attn.q_proj.bias", torch.tensor(1.0), False),
    ],
)
def test_masks_that_old_files_hold_are_no_weights(
    name: str, saved: torch.Tensor, let_through: bool, tmp_path: Path
) -> None:
    folder = checkpoints.write(tmp_path / "c", "gptj", n_inner=96, rotary_dim=8, n_layer=1)
    rewrite(folder, lambda state: state.update({name: saved}))
    if let_through:
        load_model(folder)
    else:
        with pytest.raises(CheckpointError, match=f"weights not read by the model: {name}"):
            load_model(folder)


@pytest.mark.parametrize(("model_type", "says"), [(["llama"], "must be a name"), ("llamma", "did you mean 'llama'")])
def test_a_model_type_that_is_none(model_type: object, says: str, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"model_type.*{says}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "hidden_size" not in str(caught.value)
