"""The reports of `pe-onnx check`, each read back by a parser of its kind: JSON by its schema, JUnit, Markdown."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import junitparser
import numpy as np
import pytest
from check_documents import bench, divergence, matrix, mode, parity, quality, regression
from markdown_it import MarkdownIt

from pe_onnx.check_junit import legal, to_junit
from pe_onnx.check_markdown import fence, text, to_markdown
from pe_onnx.check_report import COLUMNS, SCHEMA, BundleCheck, CheckReport, Finding

NASTY = "a|b <script>&\x1b[31m\x00 `x` ``y`` *z* _w_ [l](u) #1 ]]> \ud800 \x85 \u2028 é\n| second | line |"
PARTS = ("parity", "divergence", "quality", "sessions", "regression")
FALLEN = {"session": "a", "node": "n", "operator": "pe_onnx::AlibiBias", "provider": "cpu"}
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))


def report() -> CheckReport:
    """A bundle that passes in every part, one that fails in every way, and one that is none."""
    good = BundleCheck("bundles/rope", "rope", "cpu", "rope", "ort", "fp32", 2.5)
    good.parity = parity(mode("whole", 1e-6, True)).to_dict()
    own = {"name": "rope", "load_s": 0.1, "prefill_tokens_per_s": 2345.6, "first_token_ms": 50.0}
    own |= {"prefill_interval_tokens_per_s": (2300.0, 2400.0), "first_token_interval_ms": (49.0, 51.0)}
    decode = [
        {"depth_tokens": 128, "median_ms": 3.712, "interval_ms": (3.7, 3.8)},
        {"depth_tokens": 1024, "median_ms": 4.79, "interval_ms": (4.7, 4.9)},
    ]
    good.latency = bench({**own, "decode": decode})
    good.sessions = matrix(["a", "b"], [[0.0, 0.0], [0.0, 0.0]], []).to_dict()
    good.regression = regression(0.02, 0.1).to_dict()
    good.findings = [
        Finding("parity", "whole", "passed", "off by 1e-6", seconds=1.25, figures={"relative_error": 1e-6}),
        Finding("latency", "latency", "passed", figures={"load_s": 0.1, "peak_memory_bytes": None}),
        Finding("regression", "regression", "passed", "+2.0%", figures={"change": 0.02}),
    ]
    bad = BundleCheck(f"bundles/{NASTY}", NASTY, "cuda", "alibi", "ort", "fp16", 1.0)
    bad.parity = parity(mode("whole", math.inf, False), mode("steps", 0.25, False)).to_dict()
    bad.sessions = matrix(["a", "b"], [[0.0, math.inf], [math.inf, 0.0]], [FALLEN]).to_dict()
    bad.quality = {**quality().to_dict(), "limit": {"kl": 0.5, "rule": "given"}}
    bad.regression = regression(0.2, 0.1).to_dict()
    bad.divergence = divergence(NASTY, row=np.int64(3))
    bad.findings = [
        Finding("parity", "whole", "failed", NASTY, f"pe-onnx bisect '{NASTY}'", NASTY, 0.5, {"kl": math.nan}),
        Finding("parity", "steps", "failed", "off by 0.25"),
        Finding("latency", "latency", "error", "ValueError: x", details="Traceback\n  File <x>\n" + "x" * 9000),
        Finding("budget", "load_s", "failed", "3 is over the budget of 2", figures={"value": 3.0, "budget": 2}),
        Finding("regression", "regression", "skipped", NASTY),
    ]
    none = BundleCheck("nothing", "nothing", "cpu")
    none.findings = [Finding("bundle", "bundle", "error", "nothing is not a bundle: it does not exist")]
    options = {
        "providers": ["cpu"],
        "reference": None,
        "modes": None,
        "tolerance": None,
        "tokens": None,
        "seed": 0,
        "threads": 0,
        "text": None,
        "max_kl": None,
        "quality": True,
        "matrix": True,
        "latency": True,
        "budget_s": 20.0,
        "baseline": None,
        "max_regression": 0.1,
    }
    return CheckReport("2026-11-26T07:52:33+00:00", options, [good, bad, none], 4.25, "baseline.json")


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object within one."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_the_schema_is_a_schema_and_describes_every_key() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    places = list(objects(VALIDATOR.schema))
    assert len(places) > 20
    for place in places:
        if isinstance(place.get("additionalProperties"), dict):
            continue  # keys are names, not ours
        assert place["additionalProperties"] is False
        assert set(place["required"]) == set(place["properties"])
        assert all("description" in value for value in place["properties"].values())


def test_json_follows_the_schema() -> None:
    document = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    VALIDATOR.validate(document)
    assert document["passed"] is False
    assert [check["passed"] for check in document["checks"]] == [True, False, False]
    assert document["checks"][1]["findings"][0]["figures"] == {"kl": None}
    assert document["checks"][1]["findings"][0]["message"] == NASTY
    divergence = document["checks"][1]["divergence"]
    assert (divergence["text"], divergence["row"], divergence["inputs"][0]["std"]) == (NASTY, 3, None)
    assert document["checks"][1]["parity"]["modes"][0]["first_disagreement"]["gap"] is None
    VALIDATOR.validate(CheckReport("2026-11-26T07:52:33+00:00", report().options).to_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(extra=1),
        lambda d: d.pop("verdict"),
        lambda d: d.update(format=2),
        lambda d: d["options"].update(extra=1),
        lambda d: d["checks"][0].pop("name"),
        lambda d: d["checks"][0].update(extra=1),
        lambda d: d["checks"][0]["findings"][0].update(status="fine"),
        lambda d: d["checks"][0]["findings"][0].update(part="rest"),
        lambda d: d["checks"][0]["findings"][0].update(extra=1),
        lambda d: d["checks"][0]["parity"]["modes"].clear(),
        lambda d: d["checks"][0]["latency"]["contestants"][0]["decode"][0].pop("median_ms"),
        lambda d: d["checks"][0]["regression"].update(change="much"),
        *(lambda d, part=part: d["checks"][1][part].update(extra=1) for part in PARTS),
        *(lambda d, part=part: d["checks"][1][part].popitem() for part in PARTS),
        lambda d: d["checks"][1]["divergence"]["inputs"][0].update(extra=1),
        lambda d: d["checks"][1]["sessions"]["fallbacks"][0].pop("graph"),
        lambda d: d["checks"][1]["parity"]["angles"][0].update(extra=1),
        lambda d: d["checks"][0]["latency"]["contestants"][0].update(extra=1),
    ],
)
def test_the_schema_refuses_other_documents(change: Any) -> None:
    document = copy.deepcopy(report().to_dict())
    VALIDATOR.validate(document)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(document)


def test_junit_is_read_by_a_junit_parser(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(to_junit(report()), "utf-8")
    read = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert (read.tests, read.failures, read.errors, read.skipped, read.time) == (9, 3, 2, 1, 4.25)
    good, bad, none = read
    assert (good.name, good.tests, good.failures, good.time) == ("bundles/rope@cpu", 3, 0, 2.5)
    assert (bad.tests, bad.failures, bad.errors, bad.skipped) == (5, 3, 1, 1)
    assert {p.name: p.value for p in good.properties()} == {
        "encoding": "rope",
        "target": "ort",
        "dtype": "fp32",
        "parity.whole.relative_error": "1e-06",
        "latency.latency.load_s": "0.1",
        "regression.regression.change": "0.02",
    }
    cases = {case.name: case for case in good}
    assert list(cases) == ["parity: whole", "latency", "regression"]
    assert cases["parity: whole"].time == 1.25
    assert all(case.is_passed for case in good)
    first, second, third, fourth, fifth = bad
    assert [type(case.result[0]) for case in (first, second, third, fourth, fifth)] == [
        *(junitparser.Failure, junitparser.Failure, junitparser.Error, junitparser.Failure, junitparser.Skipped)
    ]
    assert fourth.result[0].message == "3 is over the budget of 2"
    assert "Traceback" in third.result[0].text
    assert [case.result[0].type for case in none] == ["pe_onnx.bundle"]


def test_junit_holds_any_text() -> None:
    """Read by a second parser, and compared with what was put in."""
    root = ElementTree.fromstring(to_junit(report()).encode())
    assert root.tag == "testsuites"
    failure = root.find("testsuite[2]/testcase[1]/failure")
    assert failure is not None
    one_line = legal(NASTY).replace("\n", " ")
    assert failure.get("message") in (legal(NASTY), one_line)
    assert legal(NASTY) in (failure.text or "")
    assert "next: pe-onnx bisect" in (failure.text or "")
    assert "\\x1b" in legal(NASTY)
    assert "\\x00" in legal(NASTY)
    assert "<script>&" in legal(NASTY)
    assert legal("tab\tand é and 😀\n") == "tab\tand é and 😀\n"
    timestamps = {suite.get("timestamp") for suite in root}
    assert timestamps == {"2026-11-26T07:52:33"}


def cells(rendered: str) -> list[list[str]]:
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall("<tr>(.*?)</tr>", rendered, re.DOTALL)
    ]


def test_markdown_is_a_table_whatever_it_holds() -> None:
    markdown = to_markdown(report())
    lines = markdown.split("\n")
    assert lines[0] == "## pe-onnx check: FAIL"
    assert lines[2].startswith("2 of 3: ")
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    tables = re.findall("<table>(.*?)</table>", rendered, re.DOTALL)
    rows = cells(tables[0])
    assert rows[0] == list(COLUMNS)
    assert [len(row) for row in rows] == [len(COLUMNS)] * 4
    assert rows[1] == [
        "bundles/rope",
        "cpu",
        "1.0e-06/5.0e-05",
        "100%",
        "-",
        "-",
        "2 agree",
        "3.71/4.79",
        "2,346",
        "+2.0%",
        "pass",
    ]
    assert rows[2][2:4] == ["not finite/5.0e-05", "50%"]
    assert rows[2][-1] == "<strong>FAIL</strong>"
    assert rows[3] == ["nothing", "cpu", *["-"] * 8, "<strong>FAIL</strong>"]
    modes = cells(tables[1])
    assert [len(row) for row in modes] == [5, 5, 5]
    assert modes[1][-1] == "row 0, position 17 | &lt;b&gt;"
    assert "<script>" not in rendered
    assert "<em>" not in rendered
    assert "<a " not in rendered
    assert rendered.count("<details>") == rendered.count("</details>") == 5
    assert "\x1b" not in markdown
    assert "\x00" not in markdown
    assert "x" * 3000 in markdown
    assert "x" * 5000 not in markdown, "GitHub drops a page that is too long"
    assert "baseline written: baseline.json" in markdown
    assert "Allowed: fp32, 2 layers: 5e-5" in markdown
    for tool in ("pe-onnx", "onnxruntime", "torch"):
        assert re.search(rf"{tool}(-gpu)? \d+\.\d+", lines[-2])


def test_nodes_that_fell_back_are_listed() -> None:
    """Also where the check passes."""
    passing = report()
    passing.checks = passing.checks[:1]
    nodes = "pe_onnx::AlibiBias a on cpu\npe_onnx::AlibiBias b on cpu"
    passing.checks[0].findings.append(
        Finding("sessions", "cuda, optimised", "passed", "2 fell back", details=nodes, figures={"fallbacks": 2})
    )
    assert passing.passed
    markdown = to_markdown(passing)
    assert "<summary>bundles/rope@cpu, cuda, optimised: 2 nodes fell back</summary>" in markdown
    assert nodes in markdown
    assert nodes in to_junit(passing)


def test_markdown_of_a_pass_folds_nothing() -> None:
    passing = report()
    passing.checks = passing.checks[:1]
    markdown = to_markdown(passing)
    assert markdown.startswith("## pe-onnx check: pass\n\n1 bundle on cpu, 3 findings\n")
    assert "<details>" not in markdown


@pytest.mark.parametrize("value", ["plain", NASTY, "```", "a`b", "````x````\n``", ""])
def test_code_stays_code(value: str) -> None:
    """Nothing within it ends it, and no character of it is lost but those that cannot be shown."""
    (token, *others) = MarkdownIt("commonmark").parse("\n".join(fence(value)))
    assert others == []
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in value)
    assert token.content == f"{shown}\n"


@pytest.mark.parametrize(
    "value", ["rope_nope", NASTY, "a*b*c", "<b>", "&lt;", "x|y", "~~s~~", "# head", "[a](b)", "\\"]
)
def test_text_stays_text(value: str) -> None:
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(f"x {text(value)}")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    assert "".join(child.content for child in children) == f"x {shown}"


def test_the_verdict_names_what_failed_and_is_one_line() -> None:
    verdict = report().verdict
    assert verdict.startswith("FAIL: 2 of 3: ")
    assert "@cuda: parity (whole, steps), latency, budget (load_s); nothing@cpu: bundle" in verdict
    many = report()
    many.checks = [many.checks[2]] * 12
    assert many.verdict.endswith("and 7 more")
    assert not CheckReport("").passed, "nothing checked is no pass"
