"""A file is an encoding: one hook, found by its name."""

from __future__ import annotations

import pytest
from drawn_encodings import ENCODINGS, encoding

from pe_onnx import discovery
from pe_onnx.encoding import PositionalEncoding, declared_parameters
from pe_onnx.errors import ConfigError

HOOKS = {"embed": {"embed"}, "rotate": {"tables", "rotate"}, "bias": {"bias"}, "layer": {"layer"}, "none": set()}


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_is_one_hook_and_a_docstring(name: str) -> None:
    made = encoding(name)
    hooks = set().union(*HOOKS.values())
    overridden = {hook for hook in hooks if getattr(type(made), hook) is not getattr(PositionalEncoding, hook)}
    assert overridden == HOOKS[made.hook]
    assert discovery.summary("encodings", name).endswith(".")
    assert made.parameters_used == declared_parameters(type(made))


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("ropee", "rope"), ("alibbi", "alibi"), ("sinusoid", "sinusoidal"), ("t5-bias", "t5_bias")]
)
def test_an_unknown_encoding_gives_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown encoding '{wrong}'; did you mean '{nearest}'") as caught:
        encoding(wrong)
    assert all(name in str(caught.value) for name in ENCODINGS)


@pytest.mark.parametrize("wrong", ["", "__init__", "../encodings/rope", "rope.py", "zzz"])
def test_what_is_no_registered_name_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="unknown encoding"):
        encoding(wrong)
