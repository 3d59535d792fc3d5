"""``pe-onnx doctor`` on machines that have and lack things."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from command_line import refused
from conftest import Cli

from pe_onnx import doctor, providers


def test_this_machine(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").stdout)
    tried = {entry["name"]: entry for entry in found["providers"]}
    assert tried["cpu"] == {"name": "cpu", "works": True, "problem": None}
    assert tried["cuda"]["works"] == (tried["cuda"]["problem"] is None)
    assert found["versions"]["torch"]
    assert found["missing_for_export"] == []
    shown = cli("doctor").stdout
    for words in ("provider cpu", "works", "provider cuda", "NVIDIA driver", "export", "possible"):
        assert words in shown


def test_the_exit_code_is_that_of_the_provider(cli: Cli) -> None:
    assert cli("doctor", "--provider", "cpu").returncode == 0
    refused(cli("doctor", "--provider", "cudda"), 2, "'cudda'", "did you mean 'cuda'")
    if providers.missing_for_cuda():
        result = cli("doctor", "--provider", "cuda")
        assert result.returncode == 1
        assert result.stderr.startswith("pe-onnx: provider 'cuda' does not work: ")
        assert "provider cpu" in result.stdout


Machine = dict[str, Any]
MACHINES: dict[str, tuple[Machine, str]] = {
    "a CPU build": ({"built": ["CPUExecutionProvider"]}, "is a CPU build"),
    "no driver": ({"built": ["CUDAExecutionProvider", "CPUExecutionProvider"]}, "no NVIDIA driver"),
    "no libraries": (
        {"built": ["CUDAExecutionProvider", "CPUExecutionProvider"], "driver": True, "lacks": "libcudnn.so.9"},
        "its libraries cannot be loaded: libcudnn.so.9",
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_cuda_lacks_is_named(
    machine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has, words = MACHINES[machine]
    exists = os.path.exists
    driver = has.get("driver", False)
    monkeypatch.setattr(os.path, "exists", lambda path: driver if path in providers.DRIVER_FILES else exists(path))
    monkeypatch.setattr(providers.onnxruntime, "get_available_providers", lambda: has["built"])
    lacks = has.get("lacks")
    monkeypatch.setattr(
        providers.onnxruntime, "preload_dlls", lambda: print(f"Failed to load {lacks}: no such file") if lacks else None
    )
    providers.preloaded.cache_clear()
    try:
        tried = doctor.try_provider("cuda")
        doctor.cuda()
    finally:
        providers.preloaded.cache_clear()
    assert not tried.works
    assert words in (tried.problem or "")
    assert "\n" not in (tried.problem or "")
    assert capsys.readouterr().out == ""  # where the JSON goes


def test_two_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1", "numpy": "2.4.6"}
    monkeypatch.setattr(doctor, "versions", lambda packages: dict(both))
    found = doctor.examine()
    assert "overwrite each other" in found["problems"][0]
    assert "torch" in found["missing_for_export"]


def test_a_provider_that_computes_nonsense_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WIDTH", 8)
    right = doctor.product_chain(1, 8)
    monkeypatch.setattr(doctor, "product_chain", lambda products, width: right)
    monkeypatch.setattr(doctor.np, "allclose", lambda *_: False)
    assert "came out as 4" in (doctor.try_provider("cpu").problem or "")


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:1234", "cpu:1", "cuda:-1"])
def test_numbers_of_devices(name: str) -> None:
    with pytest.raises(providers.ConfigError, match="cuda:N"):
        providers.resolve_provider(name)
    assert providers.split_number("cuda:2") == ("cuda", 2)
