"""Which nodes are the encoding's: against the graph of `none`, and on graphs written by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import Bundles

from pe_onnx.attribution import ATTENTION, ENCODING, MASKS, NORMS, PARTS, PROJECTIONS, REST, Attribution
from pe_onnx.graph_nodes import GraphNodes, Node, read_graph

ENCODINGS = {
    "none": {},
    "learned": {"Gather": 1, "Add": 1},
    "sinusoidal": {"Cast": 2, "Sin": 1, "Cos": 1, "Concat": 1, "Add": 1},
    "rope": {"Cos": 1, "Sin": 1, "RotaryEmbedding": 4},
    "t5_bias": {"T5RelativeBias": 1},
    "alibi": {"AlibiBias": 1},
    "alibi_falcon": {"Mul": 4, "Sub": 1},
}
"""Some of what each has, in a decoder of two layers."""


def operators(graph: GraphNodes, *, but: str = "") -> Counter[str]:
    """How many nodes of each operator there are, but for those of one part."""
    parts = Attribution(graph).parts
    return Counter(node.operator for node in graph.nodes if parts[node.name] != but)


CASES = [(name, "ort") for name in ENCODINGS] + [(name, "portable") for name in ("rope", "alibi", "alibi_falcon")]


@pytest.mark.parametrize(("encoding", "target"), CASES)
def test_without_the_encodings_nodes_the_graph_is_that_of_none(bundles: Bundles, encoding: str, target: str) -> None:
    graph = read_graph(bundles(encoding, target) / "model.onnx")
    plain = read_graph(bundles("none", target) / "model.onnx")
    assert operators(graph, but=ENCODING) == operators(plain)
    own = operators(graph) - operators(graph, but=ENCODING)
    assert own >= Counter(ENCODINGS[encoding])
    assert bool(own) == (encoding != "none")


def graph(
    *nodes: tuple[str, str, list[str], list[str]], tables: tuple[str, ...] = (), **functions: list[str]
) -> GraphNodes:
    """Nodes as (name, operator, inputs, outputs); those with a function's name are of our domain."""
    made = [Node(n, op, "pe_onnx" if op in functions else "", tuple(i), tuple(o)) for n, op, i, o in nodes]
    inputs = ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    return GraphNodes(made, inputs, ["logits"], dict.fromkeys(tables, True), functions)


WRITTEN_OUT = graph(
    ("embed", "Gather", ["table", "input_ids"], ["x"]),
    ("project", "MatMul", ["x", "w"], ["q"]),
    ("heads", "Transpose", ["q"], ["qh"]),
    ("cast", "Cast", ["position_ids"], ["p"]),
    ("angle", "Mul", ["p", "frequencies"], ["angles"]),
    ("cos", "Cos", ["angles"], ["c"]),
    ("sin", "Sin", ["angles"], ["s"]),
    ("first", "Slice", ["qh"], ["q1"]),
    ("second", "Slice", ["qh"], ["q2"]),
    ("negative", "Neg", ["q2"], ["n2"]),
    ("half", "Concat", ["n2", "q1"], ["turned"]),
    ("times_cos", "Mul", ["qh", "c"], ["a"]),
    ("times_sin", "Mul", ["turned", "s"], ["b"]),
    ("rotated", "Add", ["a", "b"], ["r"]),
    ("attend", "Attention", ["r", "r", "q"], ["y"]),
    ("residual", "Add", ["x", "y"], ["z"]),
    ("norm", "RMSNormalization", ["z", "g"], ["h"]),
    ("head", "MatMul", ["h", "v"], ["logits"]),
    tables=("table", "w", "v", "g", "frequencies"),
)


def test_a_rotation_that_is_written_out() -> None:
    parts = Attribution(WRITTEN_OUT).parts
    encoding = {name for name, part in parts.items() if part == ENCODING}
    assert encoding >= {"cast", "angle", "cos", "sin", "first", "negative", "times_cos", "times_sin", "rotated"}
    assert not encoding & {"embed", "project", "heads", "attend", "residual", "norm", "head"}
    expected = {"project": PROJECTIONS, "attend": ATTENTION, "norm": NORMS, "residual": REST, "embed": REST}
    assert {name: parts[name] for name in expected} == expected


def test_a_mask_on_hidden_states_is_no_encoding() -> None:
    """It depends on no token, like a positional vector, but on no position either."""
    masked = graph(
        ("embed", "Gather", ["table", "input_ids"], ["x"]),
        ("valid", "Cast", ["attention_mask"], ["m"]),
        ("masked", "Mul", ["x", "m"], ["logits"]),
        tables=("table",),
    )
    assert Attribution(masked).parts == {"embed": REST, "valid": MASKS, "masked": REST}


def test_names_that_onnxruntime_makes() -> None:
    """Inlined functions, functions in functions, and fusions."""
    found = Attribution(
        graph(
            ("layers.0.attention/rotary", "RotaryEmbedding", ["x"], ["y"]),
            ("layers.0.mlp/silu", "Mul", ["y", "input_ids"], ["z"]),
            ("layers.0.mlp/silu_1", "MatMul", ["z", "w"], ["logits"]),
            RotaryEmbedding=["x"],
            CrossAttention=["query"],
            Inner=["x"],
        )
    )
    for name, operator, part in (
        ("_inlfunc_RotaryEmbedding_n0", "Mul", ENCODING),
        ("_inlfunc_RotaryEmbedding_token_12_anything/else", "Slice", ENCODING),
        ("_inlfunc_CrossAttention_token_3_n4", "MatMul", ATTENTION),
        ("_inlfunc_Inner_token_1__inlfunc_CrossAttention_n2", "Mul", ATTENTION),
        ("layers.0.mlp/silu/QuickGeluFusion/", "QuickGelu", REST),
        ("layers.0.mlp/silu_1/MatMulAddFusion", "Gemm", PROJECTIONS),
        ("fused 17", "SkipSimplifiedLayerNormalization", NORMS),
        ("fused 18", "MultiHeadAttention", ATTENTION),
        ("fused 19", "FusedMatMul", PROJECTIONS),
        ("transposer", "Transpose", REST),
    ):
        assert found.part(name, operator) == part, name
        assert part in PARTS
