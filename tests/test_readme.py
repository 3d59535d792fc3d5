"""The README's examples run as they stand, and its tables are of what is registered and measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from checkout import ROOT

from pe_onnx import discovery, trained_weights

README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLES[number])
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if number == 1:
        model = onnx.load(tmp_path / "scores.onnx")
        assert [(f.domain, f.name) for f in model.functions] == [("pe_onnx", "AlibiBias")]
    else:
        assert len(done.stdout.split()) > 0


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


def test_the_table_lists_what_is_registered() -> None:
    section = README.read_text("utf-8").split("## Encodings")[1].split("##")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\|", section, re.MULTILINE)
    assert sorted(name for name, _ in rows) == discovery.names("encodings")


def test_the_table_lists_every_parameter() -> None:
    from pe_onnx.encoding import PositionalEncoding, declared_parameters

    section = README.read_text("utf-8").split("## Encodings")[1].split("##")[0]
    for name, cell in re.findall(r"^\| `(\w+)` \|(.*?)\|", section, re.MULTILINE):
        module = discovery.load("encodings", name)
        cls = next(
            x
            for x in vars(module).values()
            if isinstance(x, type) and issubclass(x, PositionalEncoding) and x.__module__ == module.__name__
        )
        cell = cell.replace("*RoPE's*", "`theta`, `interleaved`, `rotary_dim`")
        assert re.findall(r"`(\w+)`", cell) == list(declared_parameters(cls))


FAMILIES = "pe-onnx list --models --encodings --markdown"


def test_the_families_are_those_of_the_command(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Written by ``make families``."""
    text = README.read_text("utf-8")
    section = text.split(f"<!-- {FAMILIES} -->\n")[1].split("<!-- end -->")[0]
    assert section == cli(*FAMILIES.split()[1:]).stdout


def test_the_comparison_is_that_of_the_file() -> None:
    """Bits per byte of each contestant at each length, and what the logs of the training say."""
    found = json.loads((ROOT / "benchmarks" / "extrapolation.json").read_text())
    text = README.read_text("utf-8")
    rows = text.split("<!-- benchmarks/extrapolation.py -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert [int(cell.split()[0].replace(",", "")) for cell in rows[0].split("|")[2:-1]] == found["lengths"]
    shown = {row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows[2:]}
    assert shown == {
        c["name"]: ["cannot" if row["cannot"] else f"{row['bits_per_byte']:.3f}" for row in c["lengths"]]
        for c in found["contestants"]
    }
    seconds = [trained_weights.log(name)["seconds"] for name in trained_weights.names()]
    assert f"{round(min(seconds) / 60)} to {round(max(seconds) / 60)} minutes each" in " ".join(text.split())


def test_the_claims_are_those_of_the_file() -> None:
    import claims

    figures = json.loads((ROOT / "benchmarks" / "claims.json").read_text())["by_tokens"]
    shown = README.read_text("utf-8").split("<!-- benchmarks/claims.py -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == claims.table({int(tokens): by_measure for tokens, by_measure in figures.items()})
