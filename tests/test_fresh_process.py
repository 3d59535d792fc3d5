"""A process of its own: what comes back from it, and what it says when it goes wrong."""

from __future__ import annotations

import sys

import pytest

from pe_onnx.errors import BundleError, ConfigError
from pe_onnx.fresh_process import call_fresh, status_bytes


def test_it_returns_what_the_function_returns() -> None:
    assert call_fresh("pe_onnx.intervals:percentile", samples=list(range(50_000)), p=100) == 49_999


def test_our_own_errors_come_back_as_they_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        call_fresh("pe_onnx.providers:resolve_provider", name="cup")


@pytest.mark.parametrize("function", ["pe_onnx.nothing:f", "pe_onnx.errors:nothing", "os:abort", "os:_exit"])
def test_a_process_that_dies_is_one_line(function: str) -> None:
    arguments = {"status": 0} if function == "os:_exit" else {}
    with pytest.raises(BundleError, match=r"a process to measure in died: .+") as error:
        call_fresh(function, **arguments)
    assert "\n" not in str(error.value)


def test_it_has_nothing_of_this_process() -> None:
    """Its peak is its own: this process holds PyTorch, and for a moment 200 MB."""
    import torch

    held = torch.ones(50_000_000)
    assert call_fresh("pe_onnx.fresh_process:status_bytes", field="VmHWM") < 50e6
    most = status_bytes("VmHWM")
    assert most is not None
    assert most > held.nbytes
    del held
    if sys.platform == "linux":
        now = status_bytes("VmRSS")
        assert now is not None
        assert 0 < now <= most
