"""An encoding's parameters: their types, what they change, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from drawn_encodings import FAR, encoding

from pe_onnx.errors import ConfigError

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("rope", {"thetta": 1.0}, r"encoding 'rope': unknown parameter 'thetta'; did you mean 'theta'\?.*theta, inter"),
    ("rope", {"num_buckets": 8}, r"unknown parameter 'num_buckets' \(takes theta, interleaved, rotary_dim\)"),
    ("none", {"theta": 1.0}, r"encoding 'none': unknown parameter 'theta' \(takes no parameters\)"),
    ("alibi", {"slope": 1}, r"encoding 'alibi': unknown parameter 'slope' \(takes no parameters\)"),
    ("t5_bias", {"max_distanze": 9}, r"unknown parameter 'max_distanze'; did you mean 'max_distance'\?"),
    ("rope", {"theta": "big"}, r"theta = 'big' must be a finite number"),
    ("rope", {"theta": None}, r"theta = None must be a finite number"),
    ("rope", {"theta": [1.0]}, r"theta = \[1.0\] must be a finite number"),
    ("rope", {"theta": 0}, r"theta = 0.0 must be positive"),
    ("rope", {"theta": -1e4}, r"theta = -10000.0 must be positive"),
    ("rope", {"theta": "nan"}, r"theta = '?nan"),
    ("rope", {"theta": float("inf")}, r"theta = inf"),
    ("rope", {"rotary_dim": 2.5}, r"rotary_dim = 2.5 must be an integer"),
    ("rope", {"rotary_dim": "wide"}, r"rotary_dim = 'wide' must be an integer"),
    ("rope", {"rotary_dim": "inf"}, r"rotary_dim = 'inf' must be an integer"),
    ("rope", {"rotary_dim": 7}, r"rotary size = 7 must be even and at most the head size = 16"),
    ("rope", {"rotary_dim": 18}, r"rotary size = 18 must be even and at most the head size = 16"),
    ("rope", {"rotary_dim": -2}, r"rotary size = -2"),
    ("rope", {"interleaved": "perhaps"}, r"interleaved = 'perhaps' must be true or false"),
    ("rope", {"interleaved": 3}, r"interleaved = 3 must be true or false"),
    ("rope", {"interleaved": None}, r"interleaved = None must be true or false"),
    ("sinusoidal", {"theta": -1}, r"sinusoidal: .*theta = -1.0 positive"),
    ("sinusoidal", {"theta": float("nan")}, r"theta = nan"),
    ("t5_bias", {"num_buckets": 1}, r"num_buckets = 1 must be at least 2"),
    ("t5_bias", {"num_buckets": 32, "max_distance": 16}, r"max_distance = 16 greater than 32 // 2"),
    ("t5_bias", {"num_buckets": "many"}, r"num_buckets = 'many' must be an integer"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), WRONG, ids=[f"{name}-{given}" for name, given, _ in WRONG])
def test_a_wrong_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encoding(name, **parameters)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("rope", {"theta": "500000"}, {"theta": 500_000.0, "interleaved": False, "rotary_dim": 0}),
        ("rope", {"interleaved": "True", "rotary_dim": "8"}, {"theta": 1e4, "interleaved": True, "rotary_dim": 8}),
        ("rope", {"interleaved": "false", "rotary_dim": 8.0}, {"theta": 1e4, "interleaved": False, "rotary_dim": 8}),
        ("t5_bias", {"num_buckets": "1e1"}, {"num_buckets": 10, "max_distance": 128}),
    ],
)
def test_parameters_take_the_type_of_their_default(name: str, given: dict[str, Any], taken: dict[str, Any]) -> None:
    used = encoding(name, **given).parameters_used
    assert used == taken
    assert {key: type(value) for key, value in used.items()} == {key: type(value) for key, value in taken.items()}


def test_a_parameter_changes_the_numbers() -> None:
    base = encoding("rope")
    assert (encoding("rope", theta=20_000.0).tables(FAR)[0] - base.tables(FAR)[0]).abs().max() > 0.1
    assert encoding("rope", rotary_dim=8).tables(FAR)[0].shape[-1] == 4
    x = torch.randn(1, FAR.shape[1], 64, generator=torch.Generator().manual_seed(0))
    turned = [encoding("rope", interleaved=i).rotate(x, x, base.tables(FAR))[0] for i in (False, True)]
    assert (turned[0] - turned[1]).abs().max() > 0.1


def test_an_odd_size_is_refused_where_pairs_are_needed() -> None:
    with pytest.raises(ConfigError, match="rotary size = 15 must be even"):
        encoding("rope", {"hidden_size": 60, "num_attention_heads": 4})
    with pytest.raises(ConfigError, match="hidden_size = 63 must be even"):
        encoding("sinusoidal", {"hidden_size": 63, "num_attention_heads": 3})
    encoding("rope", {"hidden_size": 60, "num_attention_heads": 4}, rotary_dim=14)
