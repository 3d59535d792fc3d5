"""Profiles: events to times, and on real bundles of every kind of encoding the share that is the encoding's."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Bundles

from pe_onnx.attribution import ENCODING, MASKS, PARTS, PROJECTIONS, Attribution
from pe_onnx.errors import BundleError
from pe_onnx.graph_nodes import GraphNodes, Node
from pe_onnx.operator_times import node_times, profile, summarise


def event(name: str, ts: int, dur: int, operator: str = "Add") -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": operator}}


def ran(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def test_times_by_run() -> None:
    events = [
        event("before", 0, 3),  # of no run
        event("a", 12, 5),
        event("b", 20, 7, "MatMul"),
        ran(10, 40),
        event("a", 62, 6),
        ran(60, 20),
    ]
    assert node_times(events) == [{("a", "Add"): 5, ("b", "MatMul"): 7}, {("a", "Add"): 6}]


def test_a_node_with_a_subgraph_counts_without_it() -> None:
    """The profile gives an If the time of what runs in it: summed up as they are, nodes would count twice."""
    events = [
        ran(0, 100),
        event("if", 10, 50, "If"),
        event("in", 15, 30, "If"),
        event("deep", 20, 10),
        event("deeper", 35, 5),
        event("after", 70, 10),
    ]
    times = node_times(events)[0]
    assert times == {
        ("if", "If"): 20,
        ("in", "If"): 15,
        ("deep", "Add"): 10,
        ("deeper", "Add"): 5,
        ("after", "Add"): 10,
    }


NODES = GraphNodes(
    [
        Node("rotate", "RotaryEmbedding", "pe_onnx", ("x",), ("y",)),
        Node("project", "MatMul", "", ("input_ids",), ("z",)),
    ],
    ["input_ids"],
    ["z"],
    {},
    {"RotaryEmbedding": ["x"]},
)


def test_shares() -> None:
    """The quickest node shows what the profiler takes itself: 5 us, but for the one to which it counts."""
    key, other = ("_inlfunc_RotaryEmbedding_n0", "Mul"), ("project", "MatMul")
    runs = [{key: 5.0, other: us} for us in (13.0, 14.0, 400.0)]
    found = summarise("decode", 8, [[run] for run in runs], Attribution(NODES))
    assert found.profiler_us_per_node == 4
    assert found.us == 11
    assert found.parts == {**dict.fromkeys(PARTS, 0.0), ENCODING: 1 / 11, PROJECTIONS: 10 / 11}
    assert [(o.operator, o.part, o.nodes, o.us) for o in found.operators] == [
        ("MatMul", PROJECTIONS, 1, 10),
        ("Mul", ENCODING, 1, 1),
    ]


def test_a_prompt_in_chunks_is_the_sum_of_its_runs() -> None:
    key, other = ("rotate", "Mul"), ("project", "MatMul")
    repetition = [{key: 5.0, other: 15.0}, {key: 5.0, other: 25.0}]
    found = summarise("prefill", None, [repetition] * 3, Attribution(NODES))
    assert found.us == (1 + 11) + (1 + 21)
    assert found.parts[ENCODING] == pytest.approx(2 / 34)


def test_a_profile_without_nodes_is_refused() -> None:
    with pytest.raises(BundleError, match="no nodes"):
        summarise("decode", 8, [[{}]], Attribution(NODES))


@pytest.mark.parametrize("encoding", ["none", "learned", "sinusoidal", "rope", "t5_bias", "alibi"])
def test_the_encodings_share_in_a_real_bundle(bundles: Bundles, encoding: str) -> None:
    found = profile(bundles(encoding), "cpu", 1, [5, 33], [1, 2, 3], None, 0.2)
    assert [(p.phase, p.depth_tokens) for p in found] == [("prefill", None), ("decode", 5), ("decode", 33)]
    for phase in found:
        assert sum(phase.parts.values()) == pytest.approx(1)
        assert sum(operator.share for operator in phase.operators) == pytest.approx(1)
        assert list(phase.parts) == list(PARTS)
        assert (phase.parts[ENCODING] > 0) == (encoding != "none")
        assert all(phase.parts[part] > 0 for part in PARTS if part not in (ENCODING, MASKS))
        own = {operator.operator for operator in phase.operators if operator.part == ENCODING}
        if encoding == "rope":
            assert own >= {"RotaryEmbedding", "Cos", "Sin"}
        if encoding == "learned":
            assert own == {"Gather", "Add"}


def test_a_portable_bundle_with_a_prompt_in_chunks(bundles: Bundles) -> None:
    found = profile(bundles("alibi", "portable"), "cpu", 1, [5], [7] * 300, None, 0.1)
    assert found[0].parts[ENCODING] > 0
    assert sum(found[0].parts.values()) == pytest.approx(1)
