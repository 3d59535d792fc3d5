"""The decoder's configuration: round trip, defaults, presets, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from decoder_configs import GEMMA2, NEOX
from decoder_logits import plain, tokens

from pe_onnx.config import PRESETS, DecoderConfig
from pe_onnx.errors import ConfigError
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = {**NEOX, **GEMMA2, "num_key_value_heads": 1, "seed": 5, "encoding_parameters": {"theta": 500.0}}


@pytest.mark.parametrize("fields", [{}, FULL, {"head_dim": 10, "num_attention_heads": 3}, *PRESETS.values()])
def test_a_configuration_survives_the_round_trip(fields: dict[str, Any]) -> None:
    config = DecoderConfig.from_dict(fields)
    values = config.to_dict()
    assert DecoderConfig.from_dict(values) == config
    assert DecoderConfig.from_dict(json.loads(json.dumps(values))) == config
    assert set(values) == {field.name for field in dataclasses.fields(DecoderConfig)}
    assert {key: values[key] for key in fields} == fields
    values["encoding_parameters"]["theta"] = -1  # a copy
    assert config == DecoderConfig.from_dict(fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]


def test_defaults_are_resolved() -> None:
    config = DecoderConfig(hidden_size=60, num_attention_heads=5)
    assert (config.kv_heads, config.head_size, config.score_scale) == (5, 12, pytest.approx(12**-0.5))
    assert DecoderConfig(head_dim=10).score_scale == pytest.approx(10**-0.5)
    assert DecoderConfig(score_scale=1.0).score_scale == 1.0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("hiden_size", "hidden_size"), ("rope_theta", ""), ("num_kv_heads", ""), ("Encoding", "encoding"), ("", "")],
)
def test_an_unknown_key_is_named(key: str, nearest: str) -> None:
    for build in (DecoderConfig.from_dict, lambda values: DecoderConfig.preset("tiny", **values)):
        with pytest.raises(ConfigError, match=f"unknown configuration key '{key}'") as caught:
            build({key: 1})
        assert not nearest or f"did you mean '{nearest}'?" in str(caught.value)


def test_presets_are_the_sizes_they_say() -> None:
    assert {name: DecoderConfig.preset(name).hidden_size for name in PRESETS} == {"tiny": 64, "small": 512, "base": 768}
    assert DecoderConfig.preset("small", seed=3, hidden_size=64).seed == 3
    with pytest.raises(ConfigError, match="unknown preset 'smal'; did you mean 'small'"):
        DecoderConfig.preset("smal")


BAD: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name} = 0 must be a positive integer") for name in ("vocab_size", "hidden_size")),
    *(({name: -1}, f"{name} = -1") for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
    ({"intermediate_size": 1.5}, "intermediate_size = 1.5"),
    ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many'"),
    ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    ({"hidden_size": None}, "hidden_size = None"),
    ({"norm": "batch"}, "norm = 'batch' must be one of rms, layer"),
    ({"mlp": "deep"}, "mlp = 'deep' must be one of gated, plain"),
    ({"hidden_act": "tanh"}, "hidden_act = 'tanh' must be one of silu, gelu, gelu_tanh, relu"),
    ({"hidden_act": None}, "hidden_act = None"),
    ({"num_attention_heads": 5}, "num_attention_heads = 5 must be a divisor of hidden_size = 64"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must be a divisor of num_attention_heads = 4"),
    ({"head_dim": 0}, "head_dim = 0"),
    ({"head_dim": -16}, "head_dim = -16"),
    ({"head_dim": 12.5}, "head_dim = 12.5"),
    ({"head_dim": "wide"}, "head_dim = 'wide'"),
    ({"seed": "lucky"}, "seed = 'lucky'"),
    ({"norm_eps": -1.0}, "norm_eps = -1.0"),
    ({"norm_eps": "small"}, "norm_eps = 'small'"),
    ({"attention_softcap": -5.0}, "attention_softcap = -5.0"),
    ({"logit_softcap": -5.0}, "logit_softcap = -5.0"),
    ({"score_scale": "1/8"}, "score_scale = '1/8'"),
    ({"score_scale": float("nan")}, "score_scale = nan"),
    ({"embedding_scale": None}, "embedding_scale = None"),
    ({"attention_bias": "no"}, "attention_bias = 'no'"),
    ({"parallel_residual": 2}, "parallel_residual = 2"),
    ({"encoding": 3}, "encoding = 3"),
    ({"encoding_parameters": [1]}, r"encoding_parameters = \[1\]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_a_bad_value_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_dict(fields)


def test_a_score_scale_of_zero_is_zero_or_refused() -> None:
    """Never another number in silence."""
    try:
        config = DecoderConfig(encoding="none", score_scale=0.0, num_hidden_layers=1)
    except ConfigError:
        return
    decoder = Decoder(config)
    ids = tokens(1, 17)
    logits = plain(decoder, ids)
    decoder.blocks[0].attention.q_proj.weight.data.zero_()
    torch.testing.assert_close(plain(decoder, ids), logits)
