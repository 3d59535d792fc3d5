"""The pytest plugin, in test suites of its own: one line that marks a bundle, one that asserts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from check_doubles import WHERE, Parts, broken_twin
from conftest import Bundles

import pe_onnx.parity
import pe_onnx.reference  # before pytester, which unloads what a suite of its own has loaded

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("one_thread")

Suite = Callable[..., pytest.RunResult]


@pytest.fixture(scope="module")
def rope(bundles: Bundles) -> Path:
    return bundles("rope")


@pytest.fixture(scope="module")
def broken(rope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken_twin(rope, tmp_path_factory.mktemp("bad") / "rope_broken")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, object]]]:
    """Each parity check that is run, and how."""
    noted: list[tuple[Path, dict[str, object]]] = []
    original = pe_onnx.parity.check_parity

    def counted(folder: Path, **options: object) -> object:
        noted.append((folder, options))
        return original(folder, **{**options, "tokens": 12, "threads": 1})  # type: ignore[arg-type]

    monkeypatch.setattr("pe_onnx.parity.check_parity", counted)
    return noted


@pytest.fixture
def suite(pytester: pytest.Pytester, rope: Path, broken: Path, calls: object, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Runs a test file beside which the bundles ``rope`` and ``broken`` lie, whether or not pe-onnx is installed."""
    Parts().install(monkeypatch)
    (pytester.path / "rope").symlink_to(rope)
    (pytester.path / "broken").symlink_to(broken)
    pytester.makeini("[pytest]\naddopts = --strict-markers\n")

    def run(text: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(f"import pytest\n{text}")
        plugins = ("-p", "no:pe_onnx", "-p", "pe_onnx.pytest_plugin", "-p", "no:xdist", "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*plugins, *args)

    return run


TWO_LINES = """
@pytest.mark.pe_onnx_bundle("{}", modes=["steps"])
def test_parity(pe_onnx_parity):
    assert pe_onnx_parity.passed
"""
ALONE = """
@pytest.mark.pe_onnx_bundle("{}", modes=["steps"])
def test_parity():
    print("the test itself ran")
"""


MODELS = """
import json
from pathlib import Path
from pe_onnx.config import DecoderConfig
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder

def other():
    config = json.loads((Path({!r}) / "manifest.json").read_text())["source"]["config"]
    return PlainDecoder(Decoder(DecoderConfig.from_dict({{**config, "seed": 7}})))
"""


def told(result: pytest.RunResult) -> str:
    return result.stdout.str() + result.stderr.str()


def without_internals(result: pytest.RunResult) -> bool:
    """No line of a traceback within pe_onnx."""
    return not re.search(r"pe_onnx/\w+\.py:\d+|site-packages|Traceback", told(result))


@pytest.mark.parametrize("text", [TWO_LINES, ALONE])
def test_a_bundle_that_passes(text: str, suite: Suite) -> None:
    suite(text.format("rope")).assert_outcomes(passed=1)


@pytest.mark.parametrize("text", [TWO_LINES, ALONE])
def test_a_broken_twin_fails_and_is_told(text: str, suite: Suite) -> None:
    result = suite(text.format("broken"))
    result.assert_outcomes(failed=1)
    output = told(result)
    assert WHERE in output
    assert re.search(r"^mode +positions +of spread +top-1 +first over$", output, re.MULTILINE)
    assert re.search(r"^steps +12 +\d\.\de[-+]\d\d +[\d.]+% +row 0, position \d+$", output, re.MULTILINE)
    assert re.search(r"^next: pe-onnx bisect \S+/broken --mode steps$", output, re.MULTILINE)
    assert without_internals(result), output
    assert "the test itself ran" not in output


def test_one_check_for_equal_arguments(suite: Suite, calls: list[tuple[Path, dict[str, object]]]) -> None:
    result = suite(
        """
        mark = pytest.mark.pe_onnx_bundle
        @mark("rope", modes=["steps"])
        def test_a(pe_onnx_parity): assert pe_onnx_parity.passed
        @mark("rope", modes=("steps",))
        def test_b(pe_onnx_parity): assert pe_onnx_parity.passed
        @mark("rope", modes="steps")
        def test_c(): pass
        @mark("rope", modes=["steps"], tolerance=1e-3)
        def test_d(pe_onnx_parity): assert pe_onnx_parity.tolerance.error == 1e-3
        """.replace("\n        ", "\n")
    )
    result.assert_outcomes(passed=4)
    assert [(folder.name, options["tolerance"]) for folder, options in calls] == [("rope", None), ("rope", 1e-3)]


def test_marks_from_a_class_and_from_parameters(suite: Suite) -> None:
    """Of a test alone every mark counts; the fixture is of the nearest."""
    result = suite(
        """
        def of(name): return pytest.param(name, marks=pytest.mark.pe_onnx_bundle(name, modes="steps"))

        @pytest.mark.parametrize("name", [of("rope"), of("broken")])
        def test_each(name, pe_onnx_parity): assert pe_onnx_parity.passed == (name == "rope")

        @pytest.mark.pe_onnx_bundle("broken", modes="steps")
        class TestBoth:
            @pytest.mark.pe_onnx_bundle("rope", modes="steps")
            def test_alone(self): pass

            @pytest.mark.pe_onnx_bundle("rope", modes="steps")
            def test_nearest(self, pe_onnx_parity): assert pe_onnx_parity.passed
        """.replace("\n        ", "\n")
    )
    result.assert_outcomes(passed=3, failed=1)


def test_what_does_not_bear_on_a_bundle_is_left_alone(suite: Suite, calls: list[object]) -> None:
    result = suite("def test_a(): pass\ndef test_b(): assert 0")
    result.assert_outcomes(passed=1, failed=1)
    assert calls == []
    assert "pe-onnx" not in told(result).split("FAILURES")[1]


def test_a_marked_test_that_fails_of_itself(suite: Suite) -> None:
    """Parity holds, so there is nothing to say of it."""
    result = suite('@pytest.mark.pe_onnx_bundle("rope", modes="steps")\ndef test_a(pe_onnx_parity): assert 1 == 2')
    result.assert_outcomes(failed=1)
    assert "does not compute" not in told(result)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def test_a(pe_onnx_parity): pass", ['@pytest.mark.pe_onnx_bundle("DIR")']),
        ("@pytest.mark.pe_onnx_bundle\ndef test_a(pe_onnx_parity): pass", ["pe_onnx_bundle", "'folder'"]),
        ('@pytest.mark.pe_onnx_bundle("rope", mode="x")\ndef test_a(): pass', ["pe_onnx_bundle", "'mode'"]),
        ('@pytest.mark.pe_onnx_bundle("none")\ndef test_a(): pass', ["none is not a bundle", "does not exist"]),
        ('@pytest.mark.pe_onnx_bundle("none")\ndef test_a(pe_onnx_parity): pass', ["none is not a bundle"]),
        ('@pytest.mark.pe_onnx_bundle("rope", modes="stps")\ndef test_a(): pass', ["did you mean 'steps'?"]),
        ('@pytest.mark.pe_onnx_bundle("rope", reference="no/such")\ndef test_a(): pass', ["no/such", "does not exist"]),
        ('@pytest.mark.pe_onnx_bundle("rope", reference="no_such:x")\ndef test_a(): pass', ["cannot be imported"]),
        ('@pytest.mark.pe_onnx_bundle("rope", provider="cpp")\ndef test_a(): pass', ["'cpp'"]),
    ],
)
def test_what_cannot_be_checked_is_one_line(text: str, words: list[str], suite: Suite) -> None:
    result = suite(text, "--tb=short")
    counts = result.parseoutcomes()
    assert counts.get("failed", 0) + counts.get("errors", 0) == 1
    for word in words:
        assert word in told(result)
    assert without_internals(result), told(result)


def test_a_reference_beside_the_tests(suite: Suite, pytester: pytest.Pytester, rope: Path) -> None:
    """By the name of a module that lies in pytest's rootdir, and as an object."""
    pytester.makepyfile(
        own_models=f"""
        import json
        from pathlib import Path
        from pe_onnx.config import DecoderConfig
        from pe_onnx.models.decoder import Decoder
        from pe_onnx.models.exportable import PlainDecoder

        def make(**changed):
            config = json.loads((Path({str(rope)!r}) / "manifest.json").read_text())["source"]["config"]
            return PlainDecoder(Decoder(DecoderConfig.from_dict({{**config, **changed}})))

        def other(): return make(seed=7)
        """
    )
    result = suite(
        """
        import own_models
        for_rope = lambda reference: pytest.mark.pe_onnx_bundle("rope", reference, modes="steps")
        @for_rope("own_models:make")
        def test_by_name(): pass
        @for_rope("own_models:other")
        def test_another(pe_onnx_parity): assert not pe_onnx_parity.passed
        @for_rope(own_models.make())
        def test_object(): pass
        """.replace("\n        ", "\n")
    )
    result.assert_outcomes(passed=3)


def test_the_command_asks_what_the_mark_asks(suite: Suite, pytester: pytest.Pytester) -> None:
    """Or it would drill into another comparison, that may well pass."""
    (pytester.path / "a bundle").symlink_to("rope")
    mark = '"a bundle", "models:other", ["steps"], tolerance=1e-4, tokens=20, seed=3, threads=1'
    pytester.makepyfile(models=MODELS.format(str(pytester.path / "rope")))
    output = told(suite(f"@pytest.mark.pe_onnx_bundle({mark})\ndef test_it(): pass"))
    (step,) = set(re.findall(r"^next: (.*)$", output, re.MULTILINE))  # pytest repeats it in its summary on CI
    words = shlex.split(step)
    assert words[:2] == ["pe-onnx", "bisect"]
    assert words[2].endswith("/a bundle")
    asked = ["--reference", "models:other", "--length", "20", "--tolerance", "0.0001", "--seed", "3", "--threads", "1"]
    assert words[3:] == ["--mode", "steps", *asked]


def test_paths_are_relative_to_the_root(
    suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.mkdir("elsewhere")
    root = pytester.path
    pytester.makepyfile(test_it="import pytest\n" + ALONE.format("rope"))
    monkeypatch.chdir(root / "elsewhere")
    suite("", f"--rootdir={root}", "-c", str(root / "tox.ini"), str(root / "test_it.py")).assert_outcomes(passed=1)


def test_the_mark_is_listed(suite: Suite) -> None:
    assert "@pytest.mark.pe_onnx_bundle(folder, reference=None" in told(suite("", "--markers"))


def test_loading_the_plugin_loads_nothing_heavy() -> None:
    code = (
        "import pytest, sys; before = set(sys.modules); import pe_onnx.pytest_plugin; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "['pe_onnx']\n", result.stderr
