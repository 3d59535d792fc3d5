"""Sessions of a bundle against each other: a level that computes something else is named, and so is what fell back."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import t5_models
from conftest import Bundles
from rich.console import Console

import pe_onnx
from pe_onnx import session_matrix
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.cli._matrix import print_matrix
from pe_onnx.errors import ConfigError, InputError, ProviderError
from pe_onnx.session import LEVELS, RECORD_PLACEMENT, PlacedNode, Session
from pe_onnx.session_matrix import Setting, compare_sessions, fallbacks_of

AZURE = "AzureExecutionProvider"
"""In every CPU build of onnxruntime, and without a kernel for anything here."""
ASKED = Setting(AZURE, "all", 1)
in_cpu_builds = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"{AZURE} is in onnxruntime's CPU wheel alone"
)


def calling_nodes(model: Path, operator: str) -> list[str]:
    return [node.name for node in onnx.load(model, load_external_data=False).graph.node if node.op_type == operator]


def printed(matrix: session_matrix.SessionMatrix) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_matrix(matrix.to_dict(), matrix.bundle, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("ort", "fp32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("portable", "fp32"), ("ort", "fp16"))),
    ],
)
def test_levels_and_threads_agree(bundles: Bundles, target: str, dtype: str) -> None:
    matrix = compare_sessions(bundles("t5_bias", target, dtype=dtype), threads=(2, 1))
    assert matrix.names == [
        "cpu, optimised, 2 threads",
        "cpu, extended, 2 threads",
        "cpu, basic, 2 threads",
        "cpu, not optimised, 2 threads",
        "cpu, optimised, 1 thread",
    ]
    assert matrix.passed
    assert matrix.fallbacks == []
    differences = np.array(matrix.differences)
    assert (np.diag(differences) == 0).all()
    assert (differences == differences.T).all()
    assert matrix.positions > 20


@in_cpu_builds
@pytest.mark.slow
def test_an_encoder_decoder_is_compared_over_sources(tmp_path: Path) -> None:
    t5_models.write(tmp_path / "checkpoint", "few_buckets")
    pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b")
    matrix = compare_sessions(tmp_path / "b", ("cpu", AZURE), threads=(1,))
    assert matrix.passed
    assert {fallback.graph for fallback in matrix.fallbacks} == {"encoder_model.onnx", "decoder_model.onnx"}
    operators = {fallback.operator for fallback in matrix.fallbacks}
    assert {"pe_onnx::CachedAttention", "pe_onnx::CrossAttention", "pe_onnx::EncoderAttention"} <= operators


def test_a_level_that_computes_something_else_is_named(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of another theta in its place."""
    right = bundles("rope")
    other = read_bundle(bundles("rope", encoding_parameters={"theta": 9999.0}))
    opened = session_matrix._open

    def open_other(bundle: Bundle, setting: Setting, file: str) -> Session:
        return opened(other if setting.level == "basic" else bundle, setting, file)

    monkeypatch.setattr(session_matrix, "_open", open_other)
    matrix = compare_sessions(right, threads=(1,))
    assert not matrix.passed
    basic = "cpu, basic, 1 thread"
    assert len(matrix.failures) == len(LEVELS) - 1
    assert all(basic in (cell.a, cell.b) for cell in matrix.failures)
    text = printed(matrix)
    assert "FAIL" in text
    assert f"cpu, optimised, 1 thread | {basic}" in text
    assert compare_sessions(right, threads=(1,), tolerance=1.0).passed


def test_logits_that_are_not_finite_fail(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session_matrix._run
    count = iter(range(10))

    def broken(*args: object) -> np.ndarray:
        logits = run(*args)  # type: ignore[arg-type]
        logits[0, 0] = np.nan if next(count) == 1 else logits[0, 0]
        return logits

    monkeypatch.setattr(session_matrix, "_run", broken)
    matrix = compare_sessions(bundles("rope"), threads=(1,))
    assert {cell.difference for cell in matrix.failures} == {float("inf")}
    assert None in json.loads(json.dumps(matrix.to_dict(), allow_nan=False))["differences"][0]
    assert re.search(r"^apart .* 1 thread: not finite$", printed(matrix), re.MULTILINE)


@in_cpu_builds
@pytest.mark.parametrize(("target", "operator"), [("ort", "CachedAttention"), ("portable", "MaskedAttention")])
def test_a_provider_without_kernels_falls_back_and_says_so(bundles: Bundles, target: str, operator: str) -> None:
    folder = bundles("rope", target)
    matrix = compare_sessions(folder, (AZURE,), threads=(1,))
    assert matrix.passed  # slower, not wrong
    assert {fallback.provider for fallback in matrix.fallbacks} == {"cpu"}
    first = [f for f in matrix.fallbacks if f.session == matrix.names[0]]
    for name in (operator, "RotaryEmbedding"):
        found = [f.node for f in first if f.operator == f"pe_onnx::{name}" and f.body is not None]
        assert list(dict.fromkeys(found)) == calling_nodes(folder / "model.onnx", name)
    assert {f.node for f in first if f.operator == "ai.onnx::MatMul"} == set(
        calling_nodes(folder / "model.onnx", "MatMul")
    )
    text = printed(matrix)
    assert f"fell back from {AZURE} to cpu: pe_onnx::{operator} (" in text


@in_cpu_builds
def test_one_operator_that_falls_back_is_told_from_the_rest(bundles: Bundles) -> None:
    """A double: one layer's attention has no kernel, the rest has."""
    model = bundles("rope") / "model.onnx"
    placed = Session(read_bundle(model.parent), threads=1, options=RECORD_PLACEMENT).placement()
    attention = [node.name for node in placed if node.operator == "com.microsoft::GroupQueryAttention"]
    assert len(attention) == 2
    for layer, lost in enumerate(attention):
        partly = [PlacedNode(n.name, n.operator, "cpu" if n.name == lost else AZURE) for n in placed]
        (fallback,) = fallbacks_of(ASKED, partly, model)
        assert fallback.node == calling_nodes(model, "CachedAttention")[layer]
        assert (fallback.operator, fallback.body) == (
            "pe_onnx::CachedAttention",
            "com.microsoft::GroupQueryAttention",
        )
    whole = [PlacedNode(n.name, n.operator, AZURE) for n in placed]
    assert fallbacks_of(ASKED, whole, model) == []


@in_cpu_builds
def test_calls_that_were_optimised_away_leave_the_inlined_name(bundles: Bundles) -> None:
    """Which call is left cannot be told then, and is not guessed."""
    model = bundles("rope") / "model.onnx"
    name = "_inlfunc_CachedAttention_token_3_n0"
    (fallback,) = fallbacks_of(ASKED, [PlacedNode(name, "com.microsoft::GroupQueryAttention", "cpu")], model)
    assert (fallback.node, fallback.operator) == (name, "pe_onnx::CachedAttention")


def test_rows_of_ones_own(bundles: Bundles) -> None:
    matrix = compare_sessions(bundles("rope"), rows=[[1, 2], [3, 4, 5]], threads=(1,))
    assert matrix.positions == 2 * 2 + 2
    with pytest.raises(InputError, match="at least 2 tokens"):
        compare_sessions(bundles("rope"), rows=[[1]])
    with pytest.raises(InputError, match=r"token id 256 must be in 0\.\.255"):
        compare_sessions(bundles("rope"), rows=[[1, 256]])


def test_what_is_no_session_is_refused(bundles: Bundles) -> None:
    folder = bundles("rope")
    with pytest.raises(ConfigError, match="at least one provider"):
        compare_sessions(folder, ())
    with pytest.raises(ConfigError, match="must be one of cpu, cuda, auto"):
        compare_sessions(folder, ("gpu",))
    with pytest.raises(ProviderError, match=r"cannot be had; did you mean 'CPUExecutionProvider'\?"):
        compare_sessions(folder, ("CPUsExecutionProvider",))
    with pytest.raises(ConfigError, match="optimize = 'most' must be one of off, basic"):
        Session(read_bundle(folder), optimize="most")


@in_cpu_builds
def test_a_providers_own_name_is_taken(bundles: Bundles) -> None:
    bundle = read_bundle(bundles("rope"))
    assert Session(bundle, AZURE).inference.get_providers() == [AZURE, "CPUExecutionProvider"]
    assert Session(bundle, "CPUExecutionProvider").inference.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("optimize", "level"), [(True, "all"), (False, "off"), *((name, name) for name in LEVELS)])
def test_a_level_is_what_the_session_runs_with(bundles: Bundles, optimize: bool | str, level: str) -> None:
    session = Session(read_bundle(bundles("rope")), threads=1, optimize=optimize)
    assert session.inference.get_session_options().graph_optimization_level == LEVELS[level]
