"""The check of bundles: what it finds on each, what fails it, and that one bundle's failure leaves the others be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import check_documents
import pytest
from check_doubles import WHERE, Parts, broken_twin
from conftest import Bundles

import pe_onnx
from pe_onnx.baselines import KIND, read_baselines
from pe_onnx.check_markdown import to_markdown
from pe_onnx.check_report import CheckReport, baseline_line
from pe_onnx.errors import BundleError, CheckpointError, ConfigError, MissingDependencyError
from pe_onnx.suite import Budgets, Entry

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"tokens": 12, "modes": ["steps"], "threads": 1}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    made = Parts()
    made.install(monkeypatch)
    return made


@pytest.fixture(scope="module")
def rope(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundles("rope"), tmp_path_factory.mktemp("good") / "rope"))


@pytest.fixture(scope="module")
def broken(rope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken_twin(rope, tmp_path_factory.mktemp("bad") / "rope_broken")


def found(report: CheckReport, number: int = 0) -> dict[str, str]:
    """What was found, by title, to its status."""
    return {finding.title: finding.status for finding in report.checks[number].findings}


def test_a_good_bundle_passes_in_every_part(rope: Path, parts: Parts) -> None:
    stages: list[str] = []
    done: list[str] = []
    report = pe_onnx.check([rope], **SHORT, progress=stages.append, finished=lambda check: done.append(check.label))
    assert report.passed
    assert report.verdict.startswith("pass: 1 bundle on cpu, 5 findings, 1 skipped")
    assert found(report) == {
        "parity: steps": "passed",
        "sessions: cpu, optimised, all cores": "passed",
        "sessions: cpu, not optimised, all cores": "passed",
        "sessions: cpu, optimised, 1 thread": "passed",
        "latency": "passed",
        "regression": "skipped",
    }
    assert [stage.rpartition(": ")[2] for stage in stages] == ["parity", "quality", "sessions", "latency", "regression"]
    assert done == [f"{rope}@cpu"]
    assert parts.bisected == []
    assert report.checks[0].encoding == "rope"


def test_a_broken_twin_fails_and_is_drilled_into(rope: Path, broken: Path, parts: Parts) -> None:
    """Among good ones: the others are checked all the same."""
    report = pe_onnx.check([rope, broken, rope], **SHORT)
    assert [check.passed for check in report.checks] == [True, False, True]
    assert not report.passed
    assert report.verdict == f"FAIL: 1 of 3: {broken}@cpu: parity (steps)"
    (finding,) = report.checks[1].failures
    assert finding.details == WHERE
    assert "row 0, position" in finding.message
    assert finding.next_step == f"pe-onnx bisect {broken} --mode steps --length 12 --threads 1"
    assert report.checks[1].divergence == check_documents.divergence(WHERE)
    (asked,) = parts.bisected
    assert (asked["folder"], asked["modes"], asked["tokens"]) == (broken, ["steps"], 12)


def test_a_drill_down_that_breaks_loses_no_figure(broken: Path, parts: Parts) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise CheckpointError("the reference cannot\nbe run in pieces")

    parts.bisect = refuse  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        parts.install(patch)
        (check,) = pe_onnx.check([broken], **SHORT).checks
    assert check.failures[0].details == "no drill-down: the reference cannot be run in pieces"
    assert check.parity is not None
    assert check.divergence is None


@pytest.mark.parametrize("what", ["missing", "empty", "corrupted", "file"])
def test_what_is_no_bundle_is_a_failure_of_its_own(what: str, rope: Path, parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("years of work")
    elif what == "corrupted":
        shutil.copytree(rope, folder)
        (folder / "model.onnx").write_bytes(b"")
    report = pe_onnx.check([folder, rope], **SHORT)
    assert found(report) == {"bundle": "error"}
    assert str(folder) in report.checks[0].failures[0].message
    assert report.checks[1].passed
    assert not report.passed


def test_a_provider_that_cannot_be_had_is_a_failure(rope: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    from pe_onnx import providers

    monkeypatch.setattr(providers, "missing_for_cuda", lambda: "no NVIDIA driver is loaded on this machine")
    report = pe_onnx.check([rope], providers=["cuda", "cpu", "auto"], **SHORT)
    assert [check.provider for check in report.checks] == ["cuda", "cpu"]
    assert found(report) == {"bundle": "error"}
    assert "no NVIDIA driver" in report.checks[0].failures[0].message
    assert report.checks[1].passed
    assert not report.passed


def test_a_part_that_breaks_is_an_error_of_the_bundle(rope: Path, parts: Parts) -> None:
    parts.bench_error = BundleError("onnxruntime cannot run it")
    report = pe_onnx.check([rope], **SHORT)
    assert found(report)["latency"] == "error"
    assert not report.passed
    parts.bench_error = ZeroDivisionError("division by zero")
    (check,) = pe_onnx.check([rope], **SHORT).checks
    assert check.failures[0].message == "ZeroDivisionError: division by zero"
    assert "Traceback" in check.failures[0].details


def test_a_missing_package_is_not_a_matter_of_one_bundle(rope: Path, parts: Parts) -> None:
    parts.bench_error = MissingDependencyError("x is not installed")
    with pytest.raises(MissingDependencyError):
        pe_onnx.check([rope], **SHORT)


def test_sessions_that_differ(rope: Path, parts: Parts) -> None:
    """The odd one out fails, not all that differ from it."""
    parts.apart = 0.3
    parts.fallbacks = [
        {"session": "cpu, optimised, 1 thread", "node": f"n{i}", "operator": "pe_onnx::AlibiBias", "provider": "cpu"}
        for i in range(5)
    ]
    report = pe_onnx.check([rope], **SHORT)
    assert [finding.name for finding in report.checks[0].failures] == ["cpu, not optimised, all cores"]
    third = report.checks[0].of("sessions")[2]
    assert "fell back: pe_onnx::AlibiBias n0 on cpu" in third.message
    assert "2 more" in third.message
    assert third.details.count("\n") == 4
    assert third.figures["fallbacks"] == 5


def test_sessions_are_compared_as_the_rest_is_run(rope: Path, parts: Parts) -> None:
    """With the threads that were asked for first, over the rows of the seed."""
    for threads, compared in ((0, (0, 1)), (1, (1, 0)), (3, (3, 0, 1))):
        pe_onnx.check([rope], tokens=12, modes=["steps"], threads=threads, seed=7, latency=False)
        name, asked = parts.asked.pop()
        assert (name, asked["threads"], asked["seed"]) == ("sessions", compared, 7)


def test_parts_left_out_say_so(rope: Path, parts: Parts) -> None:
    report = pe_onnx.check([rope], matrix=False, latency=False, baseline=None, **SHORT)
    assert report.passed
    assert found(report) == {
        "parity: steps": "passed",
        "sessions": "skipped",
        "latency": "skipped",
        "regression": "skipped",
    }
    assert parts.asked == []


@pytest.mark.parametrize(
    ("budgets", "failing"),
    [
        (Budgets(decode_ms=5.5, first_token_ms=61, load_s=1, peak_memory_mb=51, prefill_tokens_per_s=1999), []),
        (Budgets(decode_ms=4.4), ["decode_ms"]),
        (Budgets(decode_ms=4.6), []),  # 5.0 at 1,024 tokens, and its interval begins at 4.5
        (Budgets(first_token_ms=54), ["first_token_ms"]),
        (Budgets(first_token_ms=56), []),  # 60, from 55
        (Budgets(load_s=0.4), ["load_s"]),
        (Budgets(peak_memory_mb=49), ["peak_memory_mb"]),
        (Budgets(prefill_tokens_per_s=2101), ["prefill_tokens_per_s"]),
        (Budgets(prefill_tokens_per_s=2099), []),  # 2,000, up to 2,100
        (Budgets(cache_bytes_per_token=1024), []),
        (Budgets(cache_bytes_per_token=1023), ["cache_bytes_per_token"]),
    ],
    ids=str,
)
def test_budgets(budgets: Budgets, failing: list[str], rope: Path, parts: Parts) -> None:
    (check,) = pe_onnx.check([rope], budgets=budgets, matrix=False, **SHORT).checks
    assert [finding.name for finding in check.failures] == failing
    assert {finding.name for finding in check.of("budget")} == set(budgets.given())
    for finding in check.failures:
        assert f"the budget of {budgets.given()[finding.name]:g}" in finding.message


def test_a_median_of_few_steps_has_no_interval(rope: Path, parts: Parts) -> None:
    """Over the budget it is an error, not a pass; load time and memory need none."""
    parts.intervals = False
    budgets = Budgets(decode_ms=4.9, first_token_ms=61, prefill_tokens_per_s=2001, load_s=0.4, peak_memory_mb=49)
    (check,) = pe_onnx.check([rope], budgets=budgets, matrix=False, **SHORT).checks
    assert {finding.name: finding.status for finding in check.of("budget")} == {
        "decode_ms": "error",
        "first_token_ms": "passed",
        "prefill_tokens_per_s": "error",
        "load_s": "failed",
        "peak_memory_mb": "failed",
    }
    (decode,) = [finding for finding in check.of("budget") if finding.name == "decode_ms"]
    assert decode.message.startswith("5 at 1024 tokens is over the budget of 4.9, but of fewer than 6 samples")
    assert check.of("latency")[0].message == "decode 4 ms at 128 tokens, 5 ms at 1024 tokens"


def test_budgets_without_their_figures_are_skipped(rope: Path, parts: Parts) -> None:
    """But the cache's, which is known without measuring."""
    budgets = Budgets(decode_ms=1, cache_bytes_per_token=1)
    report = pe_onnx.check([rope], budgets=budgets, latency=False, matrix=False, **SHORT)
    assert found(report)["budget: decode_ms"] == "skipped"
    assert found(report)["budget: cache_bytes_per_token"] == "failed"
    parts.peak_memory_bytes = None
    report = pe_onnx.check([rope], budgets=Budgets(peak_memory_mb=1), matrix=False, **SHORT)
    assert found(report)["budget: peak_memory_mb"] == "skipped"


def test_an_entry_comes_before_the_rest(rope: Path, parts: Parts) -> None:
    general = {"budgets": Budgets(load_s=0.1, decode_ms=9), "tolerance": 1e-12, "matrix": False, "tokens": 12}
    own = Entry(rope, tolerance=1e-3, modes=("whole",), budgets=Budgets(load_s=2))
    report = pe_onnx.check([own, rope], modes=["steps"], **general)
    assert found(report)["parity: whole"] == "passed"
    assert found(report)["budget: load_s"] == "passed"
    assert found(report)["budget: decode_ms"] == "passed"
    assert found(report, 1)["parity: steps"] == "failed"
    assert found(report, 1)["budget: load_s"] == "failed"


def test_modes_that_are_not_for_a_bundle(rope: Path, parts: Parts) -> None:
    report = pe_onnx.check([rope], modes=["steps", "left_padding"], tokens=12, matrix=False, latency=False)
    assert found(report)["parity: left_padding"] == "skipped"
    assert report.passed
    report = pe_onnx.check([rope], modes=["left_padding", "beams"], tokens=12, matrix=False, latency=False)
    assert found(report)["parity"] == "error"
    assert not report.passed


def test_a_regression(rope: Path, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.touch()
    parts.baseline = {"rope@cpu": "as it was"}
    parts.change = 0.12
    report = pe_onnx.check([rope], baseline=file, max_regression=0.1, matrix=False, budget_s=8, **SHORT)
    assert found(report)["regression"] == "failed"
    assert report.checks[0].failures[0].next_step == f"pe-onnx bench {rope} --profile --threads 1"
    assert report.checks[0].failures[0].message == "+12.0% against the baseline, 10% allowed"
    budgets = [(name, asked.get("budget_s")) for name, asked in parts.asked]
    assert budgets == [("bench", 8), ("compare", None)], "the gate's time is its own, as its benchmark measures it"
    assert pe_onnx.check([rope], baseline=file, max_regression=0.2, matrix=False, **SHORT).passed


def test_a_bundle_that_the_baseline_does_not_know(rope: Path, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.touch()
    report = pe_onnx.check([rope], baseline=file, matrix=False, **SHORT)
    assert found(report)["regression"] == "skipped"
    assert "--update-baseline" in report.checks[0].of("regression")[0].message


def test_the_baseline_is_written_but_not_of_what_is_broken(
    rope: Path, broken: Path, parts: Parts, tmp_path: Path
) -> None:
    file = tmp_path / "baseline.json"
    file.touch()
    parts.baseline = {"other@cpu": "kept", "rope_broken@cpu": "kept", "rope@cpu": "old"}
    report = pe_onnx.check([rope, broken], baseline=file, update_baseline=True, matrix=False, **SHORT)
    assert parts.written == {"other@cpu": "kept", "rope_broken@cpu": "kept", "rope@cpu": {"of": "rope"}}
    assert report.baseline_written == str(file)
    assert found(report)["regression: baseline"] == "passed"
    assert found(report, 1)["regression"] == "skipped"
    assert "parity failed" in report.checks[1].of("regression")[0].message


def test_a_baseline_of_another_format_is_made_again(
    rope: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its refusal says; with --update-baseline alone, and the check says what is lost."""
    parts.read_baselines = read_baselines  # type: ignore[method-assign]
    parts.install(monkeypatch)
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"kind": KIND, "format": 0, "bundles": {"other@cpu": {}}}))
    with pytest.raises(ConfigError, match=r"has format 0, .*: make it again with --update-baseline"):
        pe_onnx.check([rope], baseline=file, matrix=False, **SHORT)
    report = pe_onnx.check([rope], baseline=file, update_baseline=True, matrix=False, **SHORT)
    assert report.passed
    assert parts.written == {"rope@cpu": {"of": "rope"}}
    assert report.baseline_replaced == "nothing is kept of the file's format 0, which this pe-onnx does not read"
    assert report.baseline_replaced in baseline_line(report)
    assert report.baseline_replaced in to_markdown(report)
    file.write_text(json.dumps({"kind": "something of somebody's"}))
    with pytest.raises(ConfigError, match="holds no pe-onnx latency baselines"):
        pe_onnx.check([rope], baseline=file, update_baseline=True, matrix=False, **SHORT)


def test_a_new_baseline(rope: Path, parts: Parts, tmp_path: Path) -> None:
    pe_onnx.check([rope], baseline=tmp_path / "new" / "b.json", update_baseline=True, matrix=False, **SHORT)
    assert parts.written == {"rope@cpu": {"of": "rope"}}


def test_a_baseline_that_cannot_be_written_loses_no_report(
    rope: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, values: object) -> None:
        raise ConfigError(f"baseline {path} cannot be written: No space left on device")

    parts.write_baselines = full  # type: ignore[method-assign]
    parts.install(monkeypatch)
    report = pe_onnx.check([rope], baseline=tmp_path / "new.json", update_baseline=True, matrix=False, **SHORT)
    assert found(report)["regression: baseline"] == "error"
    assert "No space left" in report.checks[0].failures[0].message
    assert not report.passed
    assert report.baseline_written is None


def test_nothing_is_written_where_nothing_was_measured(broken: Path, parts: Parts, tmp_path: Path) -> None:
    report = pe_onnx.check([broken], baseline=tmp_path / "new.json", update_baseline=True, matrix=False, **SHORT)
    assert parts.written is None
    assert report.baseline_written is None


def test_bundles_of_one_name_have_no_baseline(rope: Path, broken: Path, parts: Parts, tmp_path: Path) -> None:
    other = Path(shutil.copytree(rope, tmp_path / "rope"))
    with pytest.raises(ConfigError, match="2 bundles are named rope"):
        pe_onnx.check([rope, other], baseline=tmp_path / "b", update_baseline=True, **SHORT)
    assert pe_onnx.check([rope, other], matrix=False, **SHORT).passed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ["stps"]}, ["'stps'", "did you mean 'steps'?"]),
        ({"modes": []}, ["no mode"]),
        ({"providers": ["cpp"]}, ["'cpp'", "cpu"]),
        ({"providers": []}, ["no provider"]),
        ({"tolerance": -1.0}, ["tolerance = -1.0"]),
        ({"tolerance": float("nan")}, ["tolerance = nan"]),
        ({"tokens": 1}, ["length = 1"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"threads": -1}, ["threads = -1"]),
        ({"budget_s": 0}, ["budget = 0"]),
        ({"budget_s": float("inf")}, ["budget = inf"]),
        ({"max_regression": 10}, ["max_regression = 10"]),
        ({"baseline": "nothing.json"}, ["nothing.json", "--update-baseline"]),
        ({"update_baseline": True}, ["needs a baseline"]),
        ({"reference": "nothing/there"}, ["nothing/there", "does not exist"]),
        ({"reference": "no_such_module_at_all:model"}, ["no_such_module_at_all", "cannot be imported"]),
        ({"reference": "torch:relu_"}, ["calling relu_ fails"]),
        ({"reference": "torch.nn:Lineear"}, ["Lineear", "did you mean 'Linear'?"]),
        ({"reference": "json:decoder"}, ["torch.nn.Module", "not module"]),
    ],
    ids=str,
)
def test_what_is_asked_wrongly_is_told_before_anything_is_measured(
    options: dict[str, object], words: list[str], rope: Path, parts: Parts
) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as refused:
        pe_onnx.check([rope], **options)  # type: ignore[arg-type]
    assert parts.asked == []
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_bundle_at_all() -> None:
    with pytest.raises(ConfigError, match="no bundle"):
        pe_onnx.check([])


MODULE = """
import json
from pe_onnx.config import DecoderConfig
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder

calls = []

def make(seed=None):
    calls.append(seed)
    config = json.loads({manifest!r})["source"]["config"]
    return PlainDecoder(Decoder(DecoderConfig.from_dict({{**config, **({{}} if seed is None else {{"seed": seed}})}})))

class Models:
    right = make()
    wrong = make(7)
"""


def test_a_module_of_the_users_own_is_the_reference(
    rope: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.dumps(json.loads((rope / "manifest.json").read_text()))
    (tmp_path / "own_reference.py").write_text(MODULE.format(manifest=manifest))
    options = {"matrix": False, "latency": False, "import_from": [tmp_path], **SHORT}
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    for name, passed in (("make", True), ("Models.right", True), ("Models.wrong", False)):
        report = pe_onnx.check([rope, rope], reference=f"own_reference:{name}", **options)  # type: ignore[arg-type]
        assert report.passed is passed
        step = f"pe-onnx bisect {rope} --mode steps --reference own_reference:{name} --length 12 --threads 1"
        assert [finding.next_step for check in report.checks for finding in check.failures] == [step] * 2 * (not passed)
    import own_reference  # type: ignore[import-not-found]

    assert own_reference.calls == [None, 7, None], "a function is called once for all bundles"
