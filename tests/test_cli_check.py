"""`pe-onnx check` as a command: its exit codes, its reports, its suite, and one line for each mistake."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import junitparser
import pytest
from check_doubles import WHERE, Parts, broken_twin
from command_line import refused
from conftest import Bundles, Result
from folder_contents import snapshot

from pe_onnx import cli
from pe_onnx.check_report import COLUMNS, SCHEMA

Check = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--length", 12, "--modes", "steps", "--threads", 1)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    made = Parts()
    made.install(monkeypatch)
    return made


@pytest.fixture(scope="module")
def made(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``bundles/rope`` and ``bundles/alibi``, and ``broken`` beside them."""
    root = tmp_path_factory.mktemp("made")
    for name in ("rope", "alibi"):
        shutil.copytree(bundles(name), root / "bundles" / name)
    broken_twin(root / "bundles" / "rope", root / "broken")
    return root


@pytest.fixture
def check(
    made: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """``pe-onnx check ...`` in a folder of its own that has the bundles."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(*args: object) -> Result:
        monkeypatch.setattr("sys.argv", ["pe-onnx", "check", *map(str, args)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        return Result([], code, *capsys.readouterr())  # type: ignore[arg-type]

    return run


def test_two_bundles_end_to_end(check: Check, tmp_path: Path) -> None:
    result = check("bundles/*", *SHORT, "--json", "out/r.json", "--junit", "r.xml", "--markdown", "r.md")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")
    shown = [column for column in COLUMNS if column not in ("provider", "change", "KL, nats", "bits")]
    assert lines[0].split() == [word for column in shown for word in column.split()]
    for line, name in zip(lines[1:3], ("alibi", "rope"), strict=True):
        assert line.startswith(f"bundles/{name}")
        assert line.split()[-4:] == ["agree", "4/5", "2,000", "pass"]
    assert lines[-2].startswith("pass: 2 bundles on cpu")
    assert [line.rpartition(",")[0] for line in result.stderr.strip().split("\n")] == [
        "bundles/alibi@cpu: pass",
        "bundles/rope@cpu: pass",
    ]
    document = json.loads((tmp_path / "out" / "r.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["passed"] is True
    assert document["checks"][1]["parity"]["modes"][0]["relative_error"] < 5e-5
    read = junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml"))
    assert (read.tests, read.failures, read.errors) == (12, 0, 0)
    assert (tmp_path / "r.md").read_text().startswith("## pe-onnx check: pass\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "bundles", "out", "r.md", "r.xml"]


def test_a_broken_bundle_among_good_ones(check: Check, tmp_path: Path) -> None:
    """Every report is there, and names where the two sides part."""
    (tmp_path / "r.md").write_text("the one before")
    result = check(
        *("bundles/rope", "broken", "nothing", "bundles/alibi", *SHORT),
        *("--json", "r.json", "--junit", "r.xml", "--markdown", "r.md"),
    )
    assert result.returncode == 1
    last = "pe-onnx: check failed: 2 of 4: broken@cpu: parity (steps); nothing@cpu: bundle"
    assert result.stderr.rstrip().split("\n")[-1] == last
    assert "broken@cpu, parity: steps: off by" in result.stdout
    assert f"\n  {WHERE}\n  next: pe-onnx bisect broken --mode steps --length 12 --threads 1\n" in result.stdout
    assert "nothing@cpu, bundle: nothing is not a bundle: it does not exist" in result.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert [entry["passed"] for entry in document["checks"]] == [True, False, False, True]
    assert document["checks"][1]["divergence"]["text"] == WHERE
    read = junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml"))
    assert (read.failures, read.errors) == (1, 1)
    for name in ("r.xml", "r.md"):
        assert "rotary, max abs 0.21" in (tmp_path / name).read_text()
    assert "the one before" not in (tmp_path / "r.md").read_text()


def test_json_on_standard_output_is_one_document(check: Check) -> None:
    result = check("bundles/rope", "broken", *SHORT, "--json", "-")
    assert result.returncode == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "FAIL: 1 of 2" in result.stderr


def test_nodes_that_fell_back_are_told(check: Check, parts: Parts) -> None:
    session = "cpu, optimised, 1 thread"
    parts.fallbacks = [{"session": session, "node": "n", "operator": "pe_onnx::AlibiBias", "provider": "cpu"}]
    result = check("bundles/rope", *SHORT)
    assert result.returncode == 0
    assert "bundles/rope@cpu: greatest difference of two sessions" in result.stdout
    assert "fell back from cpu to cpu: pe_onnx::AlibiBias: n\n" in result.stdout


def test_sessions_that_part_are_shown_as_a_matrix(check: Check, parts: Parts) -> None:
    """Which is left out of what agrees, and goes where the table goes."""
    assert "greatest difference" not in check("bundles/rope", *SHORT).stdout
    parts.apart = 0.3
    result = check("bundles/rope", *SHORT)
    assert result.returncode == 1
    rows = [" ".join(line.split()) for line in result.stdout.split("\n")]
    assert "2 cpu, not optimised, all cores 3e-01" in rows
    assert "3 cpu, optimised, 1 thread 0 3e-01" in rows
    assert "apart cpu, optimised, all cores | cpu, not optimised, all cores: 3.0e-01" in result.stdout
    assert "greatest difference" in check("bundles/rope", *SHORT, "--json", "-").stderr


def test_a_folder_of_any_name(check: Check, tmp_path: Path) -> None:
    """Bytes that are no text, characters that terminals and parsers act upon."""
    name = os.fsdecode(b"x\xff|\x1b[1m<&[bold]\n`")
    (tmp_path / name).mkdir()
    result = check(name, *SHORT, "--json", "r.json", "--junit", "r.xml", "--markdown", "r.md")
    assert result.returncode == 1
    assert "x\\udcff|\\x1b[1m<&[bold]\\n`@cpu, bundle: " in result.stdout
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout + result.stderr + (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["checks"][0]["bundle"] == name
    assert len(list(junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml")))) == 1


def test_the_schema_is_printed(check: Check) -> None:
    result = check("--schema")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == SCHEMA.read_text()


def test_the_page_of_a_job_keeps_what_it_holds(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "summary.md"
    page.write_text("# Before")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert check("bundles/rope", *SHORT, "--markdown", page).returncode == 0
    assert page.read_text().startswith("# Before\n## pe-onnx check: pass\n")
    other = tmp_path / "other.md"
    other.write_text("# Before")
    assert check("bundles/rope", *SHORT, "--markdown", other).returncode == 0
    assert "Before" not in other.read_text()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout")
def test_a_report_to_a_device(check: Check) -> None:
    assert check("bundles/rope", *SHORT, "--junit", os.devnull).returncode == 0
    assert not Path(os.devnull).is_file()


def test_a_report_that_cannot_be_written_in_the_end(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: the old report stays, the others are written, nothing is left beside them."""
    (tmp_path / "r.xml").write_text("the one before")
    replace = os.replace

    def full(source: object, target: object) -> None:
        if str(target).endswith("r.xml"):
            raise OSError(28, "No space left on device")
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr("os.replace", full)
    result = check("bundles/rope", *SHORT, "--junit", "r.xml", "--markdown", "r.md")
    assert result.returncode == 1
    assert result.stderr.endswith("pe-onnx: cannot write r.xml: No space left on device\n")
    assert (tmp_path / "r.xml").read_text() == "the one before"
    assert (tmp_path / "r.md").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "bundles", "r.md", "r.xml"]


def test_a_suite(check: Check, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "pe-onnx.toml").write_text(
        """
        [check]
        bundles = ["bundles/*", { path = "bundles/rope", modes = ["whole"], budgets = { decode_ms = 1 } }]
        modes = ["steps"]
        length = 12
        matrix = false
        budgets = { decode_ms = 9 }
        """
    )
    result = check("--json", "r.json")
    assert result.returncode == 1
    assert "rope@cpu, budget: decode_ms: 5 at 1024 tokens is over the budget of 1" in result.stdout
    alibi, rope = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert [alibi["passed"], rope["passed"]] == [True, False]
    assert [mode["mode"] for entry in (alibi, rope) for mode in entry["parity"]["modes"]] == ["steps", "whole"]
    assert [name for name, _ in parts.asked] == ["bench", "bench"]


def test_options_come_before_the_suite(check: Check, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.toml").write_text(
        """
        [check]
        bundles = [{ path = "../bundles/rope", modes = ["whole"], tolerance = 1e-12 }, "../bundles/none/*"]
        providers = ["cuda"]
        length = 12
        latency = false
        """
    )
    options = ("--suite", "sub/own.toml", "--json", "r.json", "--provider", "cpu", "--no-matrix")
    result = check("bundles/rope", *options)
    (rope,) = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert result.returncode == 1, "the suite's tolerance for this bundle"
    assert [mode["mode"] for mode in rope["parity"]["modes"]] == ["whole"]
    assert (rope["bundle"], rope["provider"]) == ("bundles/rope", "cpu")
    assert parts.asked == []
    assert (
        check("bundles/rope", *options, "--tolerance", "1e-3", "--modes", "steps,ragged", "--latency").returncode == 0
    )
    (rope,) = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert [mode["mode"] for mode in rope["parity"]["modes"]] == ["steps", "ragged"]
    assert [name for name, _ in parts.asked] == ["bench"]
    refused(check("--suite", "sub/own.toml"), 2, "sub/../bundles/none/*", "matches no folder")


def test_a_suite_in_pyproject(check: Check, tmp_path: Path) -> None:
    text = '[tool.pe-onnx.check]\nbundles = ["bundles/rope"]\nmodes = ["steps"]\nlength = 12\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert check().returncode == 0


def test_a_baseline(check: Check, parts: Parts, tmp_path: Path) -> None:
    result = check("bundles/rope", *SHORT, "--no-matrix", "--baseline", "b.json", "--update-baseline")
    assert result.returncode == 0, result.stderr
    assert "baseline written: b.json" in result.stdout
    assert parts.written == {"rope@cpu": {"of": "rope"}}
    (tmp_path / "b.json").touch()
    parts.baseline, parts.change = parts.written, 0.12
    options = ("bundles/rope", *SHORT, "--no-matrix", "--baseline", "b.json")
    result = check(*options)
    assert result.returncode == 1
    assert "+12.0% against the baseline, 10% allowed" in result.stdout
    assert check(*options, "--max-regression", "15%").returncode == 0
    assert check(*options, "--max-regression", "0.15").returncode == 0


MISTAKES = [
    ("", ["give DIR", "pe-onnx.toml", "[tool.pe-onnx.check]"]),
    ("'none/*'", ["none/*", "matches no folder"]),
    ("bundles/rope --suite nothing.toml", ["nothing.toml", "No such file"]),
    ("bundles/rope --modes stps", ["'stps'", "did you mean 'steps'?"]),
    ("bundles/rope --modes stps --json new/folder/r.json", ["'stps'"]),
    ("bundles/rope --modes steps,,whole", ["--modes", "'steps,,whole'"]),
    ("bundles/rope --modes ''", ["--modes"]),
    ("bundles/rope --provider cpp", ["'cpp'", "cpu"]),
    ("bundles/rope --tolerance -1", ["tolerance = -1"]),
    ("bundles/rope --tolerance much", ["--tolerance", "'much'"]),
    ("bundles/rope --max-regression ten --baseline b", ["--max-regression = 'ten'", "10% or 0.1"]),
    ("bundles/rope --max-regression 10 --baseline b", ["--max-regression = '10'", "10% or 0.1"]),
    ("bundles/rope --max-regression 10%", ["--max-regression", "--baseline"]),
    ("bundles/rope --update-baseline", ["--update-baseline", "--baseline"]),
    ("bundles/rope --baseline b --update-baseline --no-latency", ["--update-baseline", "--no-latency"]),
    ("bundles/rope --baseline none.json", ["none.json", "does not exist", "--update-baseline"]),
    ("bundles/rope --baseline file/b.json --update-baseline", ["--baseline file/b.json cannot be written"]),
    ("bundles/rope --json bundles", ["--json bundles is a folder"]),
    ("bundles/rope --json file/r.json", ["--json file/r.json cannot be written"]),
    ("bundles/rope --junit /proc/none/r.xml", ["--junit /proc/none/r.xml cannot be written"]),
    ("bundles/rope --json r --junit ./r", ["--json", "--junit", "one file"]),
    ("bundles/rope --json - --markdown -", ["--json", "--markdown", "one file"]),
    ("bundles/rope --reference none/there", ["none/there", "does not exist"]),
    ("bundles/rope --reference no_module_here:make", ["no_module_here", "cannot be imported"]),
    ("bundles/rope --length 1", ["length = 1"]),
    ("bundles/rope --seed -1", ["seed = -1"]),
    ("bundles/rope --threads -1", ["threads = -1"]),
    ("bundles/rope --budget 0", ["budget = 0"]),
    ("bundles/rope --jnuit r.xml", ["--jnuit", "--junit"]),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_one_line_before_anything_is_measured(
    line: str, words: list[str], check: Check, parts: Parts, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("years of work")
    before = snapshot(tmp_path)
    refused(check(*shlex.split(line)), 2, *words)
    assert parts.asked == []
    assert snapshot(tmp_path) == before


def test_a_mistake_in_the_suite_is_one_line(check: Check, tmp_path: Path) -> None:
    (tmp_path / "pe-onnx.toml").write_text("[check]\nbundels = []\n")
    refused(check(), 2, "pe-onnx.toml", "'bundels'", "did you mean 'bundles'?")
