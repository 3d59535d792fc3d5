"""`pe-onnx list`: the same names in the table and in JSON."""

from __future__ import annotations

import json
import os
import re

from conftest import Cli

from pe_onnx import discovery


def test_list(cli: Cli) -> None:
    result = cli("list")
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(cli("list", "--json").stdout)
    assert list(shown["encodings"]) == discovery.names("encodings")
    assert set(shown) == {"encodings", "families", "presets", "targets"}
    for kind in ("encodings", "presets", "targets"):
        for name in shown[kind]:
            assert re.search(rf"^ {name} ", result.stdout, re.MULTILINE), name
    assert f"{len(shown['families'])} families" in result.stdout


def test_list_of_families(cli: Cli) -> None:
    document = json.loads(cli("list", "--models", "--json").stdout)
    result = cli("list", "--models", "--encodings", env={**os.environ, "COLUMNS": "400"})
    assert (result.returncode, result.stderr) == (0, "")
    for name, row in document["families"].items():
        cells = [row.get("encoding"), row.get("route"), ", ".join(row.get("targets", []))]
        if row["status"] != "right":
            cells = [row["reason"]] if row["status"] == "refused" else []
        lines = [line for line in result.stdout.splitlines() if line.startswith(f" {name} ")]
        assert len(lines) == bool(cells), name
        assert all(str(cell) in line for cell in cells for line in lines), name
    assert cli("list", "--markdown").returncode == 2
