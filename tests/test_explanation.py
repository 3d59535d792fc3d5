"""`pe-onnx explain`: every encoding's file says what it is, and what is counted is what the graph has."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import refused
from conftest import Bundles, Cli

from pe_onnx import discovery
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import build_encoding
from pe_onnx.encoding_cost import AddedNodes, cost, difference, operator
from pe_onnx.errors import ConfigError
from pe_onnx.explanation import HOOKS, SECTIONS, explain, sections
from pe_onnx.graph_nodes import read_graph

ENCODINGS = discovery.names("encodings")
NEEDED = ("formula", "paper", "limits", "cost", "cache")
ROPE = ast.get_docstring(ast.parse(discovery.files("encodings")["rope"].read_text("utf-8"))) or ""
README = Path(__file__).parent.parent / "README.md"


def lacking(docstring: str) -> list[str]:
    found = sections(docstring)
    return [section for section in (*NEEDED, "title") if len(found[section]) < 4]


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_file_has_every_section(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(discovery.files("encodings")[name].read_text("utf-8")))
    assert lacking(docstring or "") == []
    assert explain(name).missing == []
    assert explain(name).title == discovery.summary("encodings", name).rstrip(".")


@pytest.mark.parametrize("section", NEEDED)
@pytest.mark.parametrize("how", ["no name", "no text"])
def test_a_file_without_one_is_found(section: str, how: str) -> None:
    """The broken twin: the section's name is gone, or what stood under it."""
    name = section.capitalize()
    assert lacking(ROPE) == []
    if how == "no name":
        broken = re.sub(rf"^{name}::?", "", ROPE, flags=re.MULTILINE)
    else:
        broken = re.sub(rf"^({name}::?)(.*?)(?=\n\n[A-Z][a-z]+:|\Z)", r"\1", ROPE, flags=re.MULTILINE | re.DOTALL)
    assert broken != ROPE
    assert lacking(broken) == [section]


def test_sections_are_taken_apart() -> None:
    text = "Title: it.\n\nWhat it\nis.\n\nFormula::\n\n    a = b\n      + c\n\nwhere b.\n\n"
    text += "Paper: One 2020,\ntwo.\n\nLimits: none."
    assert sections(text) == {
        "title": "Title: it",
        "text": "What it is.",
        "formula": "a = b\n  + c\n\nwhere b.",
        "paper": "One 2020, two.",
        "cost": "",
        "cache": "",
        "limits": "none.",
    }


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_hook_is_that_of_the_class(name: str) -> None:
    assert explain(name).hook == build_encoding(DecoderConfig(encoding=name)).hook
    assert explain(name).hook in HOOKS


def test_the_operators_are_those_of_the_readme() -> None:
    table = README.read_text("utf-8").split("## Encodings")[1].split("##")[0]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| `\w", line)]
    named = {row[1].strip(" `"): [cell for cell in [row[-2].strip(" `")] if cell] for row in rows}
    assert named == {name: list(explain(name).operators) for name in ENCODINGS}


def counted(nodes: AddedNodes) -> Counter[str]:
    return Counter(operator(node) for node in nodes.added)


@pytest.mark.parametrize("name", ["rope", "alibi", "t5_bias", "sinusoidal", "learned", "none"])
def test_the_nodes_are_those_of_the_graph(name: str, bundles: Bundles) -> None:
    """Against the onnx package's count of either graph, by operator."""

    def operators(folder: Path) -> Counter[str]:
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)

    found = difference(read_graph(bundles(name) / "model.onnx"), read_graph(bundles("none") / "model.onnx"))
    assert counted(found) == operators(bundles(name)) - operators(bundles("none"))
    assert found.removed == []
    expected = {
        "rope": {"pe_onnx::RotaryEmbedding": 4, "Cos": 1, "Sin": 1},
        "alibi": {"pe_onnx::AlibiBias": 1},
        "t5_bias": {"pe_onnx::T5RelativeBias": 1},
        "sinusoidal": {"Cos": 1, "Sin": 1, "Concat": 1},
        "learned": {"Gather": 1, "Add": 1},
        "none": {},
    }
    assert expected[name].items() <= counted(found).items()
    assert found.functions == [one.partition("::")[2] for one in explain(name).operators]


def test_a_node_more_or_less_is_seen(bundles: Bundles) -> None:
    graph = read_graph(bundles("none") / "model.onnx")
    fewer = graph._replace(nodes=[*graph.nodes[:20], *graph.nodes[21:]])
    assert difference(graph, fewer) == AddedNodes([graph.nodes[20]], [], [])
    assert difference(fewer, graph) == AddedNodes([], [graph.nodes[20]], [])


@pytest.mark.parametrize(
    ("name", "parameters", "step_bytes"),
    [
        ("none", 0, {512: 0, 1024: 0, 3072: 0}),
        ("alibi", 0, {512: 4 * 512 * 4, 1024: 4 * 1024 * 4, 3072: 4 * 3072 * 4}),  # heads, keys, float32
        ("t5_bias", 32 * 4, {512: 8192, 1024: 16384, 3072: 49152}),
        ("t5_bias_per_layer", 2 * 32 * 4, {512: 16384, 1024: 32768, 3072: 98304}),  # two layers
        ("fire_shared", 2 + 32 + 32 + 32 * 4 + 4, {512: 8192, 1024: 16384, 3072: 49152}),
        ("rope", 0, dict.fromkeys((512, 1024, 3072), 2 * 8 * 4)),  # cosines and sines of 8 pairs
        ("rope_nope", 0, dict.fromkeys((512, 1024, 3072), 2 * 8 * 4)),
        ("xpos", 0, dict.fromkeys((512, 1024, 3072), 4 * 8 * 4)),
        ("learned", 2048 * 64, {512: 64 * 4, 1024: 64 * 4}),  # no row for 3072
    ],
)
def test_what_is_counted(name: str, parameters: int, step_bytes: dict[int, int]) -> None:
    found = cost(build_encoding(DecoderConfig(encoding=name)))
    assert (found.parameters, found.step_bytes) == (parameters, step_bytes)


def test_the_command(run: Cli, tmp_path: Path) -> None:
    result = run("explain", "rope:theta=500000", "--count", "--plot", "rope.svg")
    assert (result.returncode, result.stderr) == (0, "picture: rope.svg\n")
    for words in ("angle[t, i] = t * theta^(-2i/R)", "Su et al. 2021", "pe_onnx::RotaryEmbedding", "theta = 500000.0"):
        assert words in result.stdout
    assert (tmp_path / "rope.svg").read_bytes().startswith(b"<?xml")
    text = run("explain", "t5_bias", "--markdown").stdout
    assert text.startswith("### `t5_bias`: T5 relative bias")
    assert "```\nd = max(i - j, 0)" in text


def test_json_is_one_document(run: Cli) -> None:
    shown: dict[str, Any] = json.loads(run("explain", "rope_nope", "--json", "--graph", "--count").stdout)
    assert set(SECTIONS) < set(shown)
    assert shown["hook"] == "layer"
    assert Counter(node["operator"] for node in shown["graph"]["added"])["pe_onnx::RotaryEmbedding"] == 2
    assert shown["count"]["parameters"] == 0
    plain = json.loads(run("explain", "rope_nope", "--json").stdout)
    assert plain.keys() == shown.keys() - {"graph", "count"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("alby",), "unknown encoding 'alby'; did you mean 'alibi'?"),
        (("rope:thetta=1",), "unknown parameter 'thetta'; did you mean 'theta'?"),
        (("rope:theta",), "'theta' must be name=value"),
        (("rope", "--plot", "rope.pdf"), "must end in .png or .svg"),
        (("rope", "--plot", "missing.svg/../x/"), "must end in .png or .svg"),
        (("rope", "--json", "--markdown"), "give one of --markdown and --json"),
        (("rope", "--count", "--preset", "smal"), "did you mean 'small'?"),
    ],
)
def test_mistakes_are_one_line(run: Cli, args: tuple[str, ...], said: str) -> None:
    refused(run("explain", *args), 2, said)


OWN = '''"""A term of my own."""
import torch
from pe_onnx.encoding import PositionalEncoding

class Mine(PositionalEncoding):
    def bias(self, query_positions, key_positions, key_length):
        keys = torch.arange(key_length)[None] if key_positions is None else key_positions
        return (keys[:, None] - query_positions[:, :, None])[:, None].float().expand(-1, 4, -1, -1)
'''


def test_an_encoding_of_ones_own_says_what_its_file_lacks(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "encodings"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN)
    env = {**os.environ, "PE_ONNX_PATH": str(tmp_path), "COLUMNS": "200"}
    result = cli("explain", "mine", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "missing" in result.stdout
    assert "Formula, Paper, Cost, Cache, Limits" in result.stdout
    assert "bias: a term added to the scores" in result.stdout
    (folder / "mine.py").write_text(OWN.replace('own."""', 'own.\n\nPaper: none.\n"""'))
    assert "docstring: Formula, Cost, Cache, Limits" in cli("explain", "mine", env=env).stdout
    (folder / "mine.py").write_text("class (")
    refused(cli("explain", "mine", env=env), 2, "cannot be read as Python")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'xpos'"):
        explain("xpo")
