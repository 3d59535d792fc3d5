"""`pe-onnx list`: the same names in the table and in JSON."""

from __future__ import annotations

import json
import re

from conftest import Cli

from pe_onnx import discovery


def test_list(cli: Cli) -> None:
    result = cli("list")
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(cli("list", "--json").stdout)
    assert list(shown["encodings"]) == discovery.names("encodings")
    assert set(shown) == {"encodings", "families", "presets", "targets"}
    for names in shown.values():
        for name in names:
            assert re.search(rf"^ {name} ", result.stdout, re.MULTILINE), name
