"""Keys about positions and attention in a config.json: listed with value and origin, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import TRAINED, VOCAB, Edit
from conftest import Cli

from pe_onnx.errors import CheckpointError
from pe_onnx.exporter import silenced
from pe_onnx.models import checkpoint
from pe_onnx.models.encoding_config import DEFAULT, Encoding

FILE = "config.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 64}
LAYERED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
MPT = {"d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": TRAINED, "vocab_size": VOCAB}

OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
Read = Callable[..., Encoding]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """``read("llama", {"rope_theta": 9.0}, rope_parameters=...)``: a checkpoint of that configuration, whose
    config.json is then updated, or edited by a function."""

    def made(
        model_type: str, edit: dict[str, Any] | Edit | None = None, follow: bool = False, **config: Any
    ) -> Encoding:
        def change(values: dict[str, Any]) -> None:
            if isinstance(edit, dict):
                values.update(edit)
            elif edit is not None:
                edit(values)

        with silenced():
            checkpoints.write(tmp_path / "c", model_type, change, **config)
            return checkpoint.load(tmp_path / "c", follow=follow).encoding

    return made


def value(read: Encoding, name: str) -> tuple[Any, str]:
    entry = read.parameters[name]
    return entry["value"], entry["origin"]


def test_origins_tell_the_file_from_the_default(read: Read) -> None:
    encoding = read("llama", rope_parameters=YARN)
    assert encoding.name == "rope"
    assert value(encoding, "rope_theta") == (5e5, FILE)
    assert value(encoding, "original_max_position_embeddings") == (64, FILE)
    assert value(encoding, "beta_fast") == (32, DEFAULT)
    assert value(encoding, "truncate") == (True, DEFAULT)
    factor, origin = value(encoding, "attention_factor")
    assert (round(factor, 4), origin) == (1.1386, DEFAULT)
    assert value(encoding, "num_key_value_heads") == (2, FILE)


def test_a_default_that_the_file_does_not_name(read: Read) -> None:
    encoding = read("llama", lambda values: values.pop("rope_parameters"))
    assert value(encoding, "rope_theta") == (10000.0, DEFAULT)
    assert value(encoding, "rope_type") == ("default", DEFAULT)


def old_spelling(values: dict[str, Any]) -> None:
    del values["rope_parameters"]
    values.update(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})


def test_the_old_spelling_is_the_files_too(read: Read) -> None:
    encoding = read("llama", old_spelling)
    assert {name: value(encoding, name) for name in ("rope_theta", "rope_type", "factor")} == {
        "rope_theta": (5e5, FILE),
        "rope_type": ("linear", FILE),
        "factor": (4.0, FILE),
    }


def older_neox(values: dict[str, Any]) -> None:
    del values["rope_parameters"]
    values.update(rotary_pct=0.5, rotary_emb_base=300)


def test_spellings_of_one_family(read: Read) -> None:
    encoding = read("gpt_neox", older_neox)
    assert value(encoding, "partial_rotary_factor") == (0.5, FILE)
    assert value(encoding, "rope_theta") == (300, FILE)


def older_gemma3(values: dict[str, Any]) -> None:
    del values["rope_parameters"]
    values.update(rope_theta=900.0, rope_local_base_freq=300.0, rope_scaling={"rope_type": "linear", "factor": 4.0})


@pytest.mark.parametrize("edit", [None, older_gemma3])
def test_nested_by_layer_type(edit: Edit | None, read: Read) -> None:
    types = ["sliding_attention", "full_attention"]
    encoding = read("gemma3_text", edit, rope_parameters=LAYERED, layer_types=types, sliding_window=30)
    assert value(encoding, "rope_parameters.full_attention.rope_theta") == (900.0, FILE)
    assert value(encoding, "rope_parameters.full_attention.factor") == (4.0, FILE)
    assert value(encoding, "rope_parameters.sliding_attention.rope_theta") == (300.0, FILE)
    assert value(encoding, "sliding_window") == (30, FILE)
    assert value(encoding, "layer_types") == (types, FILE)


@pytest.mark.parametrize(
    ("model_type", "config", "name"),
    [
        ("gpt2", {}, "learned"),
        ("opt", {"word_embed_proj_dim": 64}, "learned"),
        ("ctrl", {"n_embd": 64, "n_layer": 1, "n_head": 4, "dff": 96, "n_positions": TRAINED}, "sinusoidal"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "rope"),
        ("mpt", MPT, "alibi"),
    ],
)
def test_what_the_encoding_is_called(model_type: str, config: dict[str, Any], name: str, read: Read) -> None:
    assert read(model_type, **config).name == name


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        ({"alibi": True}, "alibi = true"),
        ({"no_rope_layers": [0, 1]}, r"no_rope_layers = \[0, 1\]"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"rotary_dim": 8}, "rotary_dim"),
        ({"sliding_window": 16}, "sliding_window"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor",
        ),  # Llama reads it for its scalings, not for plain RoPE
        ({"rope_theta": 77.0}, "rope_theta = 77.0"),  # beside rope_parameters, which has another
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_thetta": 500.0}, "rope_thetta.*did you mean 'rope_theta'|rope_thetta"),
        ({"hed_dim": 16}, "hed_dim.*did you mean 'head_dim'"),
        ({"num_atention_heads": 4}, "num_atention_heads.*did you mean 'num_attention_heads'"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(edit: dict[str, Any], word: str, read: Read) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: nothing in llama reads {word}"):
        read("llama", edit)


@pytest.mark.parametrize(
    ("model_type", "edit", "config"),
    [
        ("llama", {"rope_interleaved": False, "alibi": None, "sliding_window": None}, {}),
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": YARN}),  # said twice
        ("llama", {"attention_dropout": 0.1, "use_flash_attn": True, "_attn_implementation": "eager"}, {}),
        ("gpt2", {"n_ctx": TRAINED}, {}),
        ("phi3", {"original_max_position_embeddings": TRAINED, "rope_scaling": None}, {}),  # Phi-4
        ("llama", {"rope_scaling": {**OLD_YARN, "finetuned": True}, "rope_parameters": None}, {}),  # YaRN-Llama
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}, {}),
        ("qwen2", {"max_window_layers": 2}, {"use_sliding_window": True, "sliding_window": 9}),  # as layer_types say
    ],
)
def test_a_key_that_makes_no_difference_is_let_through(
    model_type: str, edit: dict[str, Any], config: dict[str, Any], read: Read
) -> None:
    assert not read(model_type, edit, **config).ignored


def test_a_count_that_contradicts_the_list_made_of_it_is_refused(read: Read) -> None:
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert value(read("qwen2", **window), "max_window_layers") == (1, FILE)
    with pytest.raises(CheckpointError, match="reads max_window_layers = 0"):
        read("qwen2", {"max_window_layers": 0}, **window)


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({**YARN, "beta_fst": 8}, r"rope_parameters.beta_fst = 8 .*did you mean 'beta_fast'"),
        (
            {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0},
            r"rope_parameters.factor = 4.0 for rope_type 'default'",
        ),
        ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "yarm", "rope_theta": 1e4}, "'yarm'|\"yarm\" is not known .*did you mean 'yarn'"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast = 1 must be greater than beta_slow = 2"),
        ({**YARN, "factor": 0.5}, "rope_parameters.factor = 0.5 must be a number from 1 or null"),
        ({**YARN, "truncate": None}, "rope_parameters.truncate = null must be true or false"),
        ({**YARN, "rope_theta": -1}, "rope_parameters.rope_theta = -1 must be a number above 1"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": None}, "factor = null must be a number from 1"),
    ],
)
def test_rope_parameters_that_are_wrong(rope: dict[str, Any], says: str, read: Read) -> None:
    with pytest.raises(CheckpointError, match=says):
        read("llama", {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("model_type", "edit", "says"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ("llama", {"head_dim": 32}, r"weights of another shape: .*head_dim = 32"),
        ("mistral", {"sliding_window": -5}, "sliding_window = -5 must be an integer from 0 or null"),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers = \[1, 2\] must be a list of 0 and 1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries and must have one for each of the 2 layers"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings = 0 must be a positive integer"),
        (
            "gemma2",
            {"attn_logit_softcapping": "much"},
            'attn_logit_softcapping = "much" must be a positive number or null',
        ),
    ],
)
def test_values_that_are_wrong(model_type: str, edit: dict[str, Any], says: str, read: Read) -> None:
    with pytest.raises(CheckpointError, match=says):
        read(model_type, edit)


OLMO3 = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 900.0}}


def mpt_bias(values: dict[str, Any]) -> None:
    values["attn_config"]["alibi_bias_max"] = 4


@pytest.mark.parametrize(
    ("model_type", "edit", "config", "ignored"),
    [
        ("mpt", mpt_bias, MPT, {"attn_config.alibi_bias_max": 4}),
        ("olmo3", OLMO3, {}, {f"rope_parameters.{key}": value for key, value in OLMO3["rope_parameters"].items()}),
    ],
)
def test_what_transformers_ignores_is_refused_or_followed(
    model_type: str, edit: Any, config: dict[str, Any], ignored: dict[str, Any], read: Read, tmp_path: Path, run: Cli
) -> None:
    with pytest.raises(CheckpointError, match=rf"nothing in {model_type} reads {next(iter(ignored))}.*--follow-transf"):
        read(model_type, edit, **config)
    assert read(model_type, edit, follow=True, **config).ignored == ignored
    export = ("export", "--model", tmp_path / "c", "-o", tmp_path / "b", "--target", "portable")
    refused, followed = run(*export), run(*export, "--follow-transformers")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert followed.returncode == 0
    lines = followed.stderr.splitlines()
    for name, number in zip(ignored, lines[:-1], strict=True):
        assert number.startswith(f"pe-onnx: warning: transformers ignores {name} = ")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["encoding"]["ignored"] == ignored
    with silenced():
        model = checkpoints.oracle(tmp_path / "c")
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, 40))
    session = onnxruntime.InferenceSession(str(tmp_path / "b" / "model.onnx"))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(40)[None]}
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]}
    have = session.run(["logits"], {**feeds, **past})[0]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(have - want).max() <= 5e-5 * want.std()
