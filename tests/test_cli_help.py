"""`pe-onnx --help` and `--version`, and the help of each command."""

from __future__ import annotations

import pytest
from conftest import Cli

import pe_onnx
from pe_onnx import discovery


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_help(cli: Cli, option: str) -> None:
    result = cli(option)
    assert (result.returncode, result.stderr) == (0, "")
    if option == "--version":
        assert result.stdout == f"pe-onnx, version {pe_onnx.__version__}\n"
    else:
        assert all(f"  {name} " in result.stdout for name in discovery.names("cli"))


@pytest.mark.parametrize("name", discovery.names("cli"))
def test_help_of_each_command(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{name} [OPTIONS]" in result.stdout
    assert "--help" in result.stdout
