"""The suite file of `pe-onnx check`: what it may say, where it is found, and one line for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_onnx.errors import ConfigError
from pe_onnx.suite import Budgets, Entry, expand, find_suite, parse_share, read_suite

WHOLE = """
[check]
bundles = [
    "bundles/*",
    { path = "smollm2", reference = "models/smollm2", tolerance = 1e-4, modes = ["whole"], budgets = { load_s = 2 } },
    { path = "own", reference = "package.module:make" },
]
providers = ["cpu", "cuda"]
reference = "all"
modes = ["steps", "greedy"]
tolerance = 0.001
baseline = "baseline.json"
max-regression = "15%"
budgets = { decode_ms = 40, prefill_tokens_per_s = 500.5 }
length = 32
seed = 3
threads = 1
latency = false
matrix = true
"""


def write(folder: Path, text: str, name: str = "pe-onnx.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_all_that_a_suite_may_say(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, WHOLE))
    assert suite.bundles == (
        Entry("bundles/*"),
        Entry("smollm2", str(tmp_path / "models/smollm2"), 1e-4, ("whole",), Budgets(load_s=2)),
        Entry("own", "package.module:make"),
    )
    assert (suite.providers, suite.modes, suite.tolerance) == (("cpu", "cuda"), ("steps", "greedy"), 0.001)
    assert suite.reference == str(tmp_path / "all")
    assert (suite.baseline, suite.max_regression) == (tmp_path / "baseline.json", 0.15)
    assert suite.budgets == Budgets(decode_ms=40, prefill_tokens_per_s=500.5)
    assert (suite.length, suite.seed, suite.threads, suite.latency, suite.matrix) == (32, 3, 1, False, True)


def test_a_suite_in_pyproject(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE.replace("[check]", "[tool.pe-onnx.check]"), "pyproject.toml")
    assert read_suite(file).seed == 3


def test_where_a_suite_is_found(tmp_path: Path) -> None:
    assert find_suite(tmp_path) is None
    project = write(tmp_path, "[tool.other]\n", "pyproject.toml")
    assert find_suite(tmp_path) is None
    write(tmp_path, "[tool.pe-onnx.check]\n", "pyproject.toml")
    assert find_suite(tmp_path) == project
    assert find_suite(tmp_path) != write(tmp_path, "[check]\n")
    assert find_suite(tmp_path) == tmp_path / "pe-onnx.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[check\n", ["no valid TOML", "line 1"]),
        ("", ["no table [check]"]),
        ("[chek]\n", ["'chek'", "did you mean 'check'?"]),
        ("check = 3\n", ["[check]", "must be a table"]),
        ("[check]\n", ["[check]", "no bundles"]),
    ],
)
def test_what_is_no_suite(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_suite(write(tmp_path, text))
    assert all(word in str(refused.value) for word in [str(tmp_path / "pe-onnx.toml"), *words])


@pytest.mark.parametrize("text", ["", "tool = 3", "[tool]", "tool.pe-onnx = 3", "[tool.pe-onnx]"])
def test_a_pyproject_without_a_suite(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, text, "pyproject.toml")
    assert find_suite(tmp_path) is None
    with pytest.raises(ConfigError, match=r"no table \[tool.pe-onnx.check\]"):
        read_suite(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bundels = ['a']", ["unknown key 'bundels'", "did you mean 'bundles'?", "providers"]),
        ("max_regression = '10%'", ["'max_regression'", "did you mean 'max-regression'?"]),
        ("bundles = 'a'", ["bundles = 'a'", "a list"]),
        ("bundles = []", ["bundles = []", "a list"]),
        ("bundles = [3]", ["bundles = [3]", "a list"]),
        ("bundles = [{ reference = 'a' }]", ["bundles[0] has no path"]),
        ("bundles = ['a', { path = 'b', tolerence = 1 }]", ["bundles[1]", "'tolerence'", "did you mean 'tolerance'?"]),
        ("bundles = [{ path = 'b', tolerance = 'x' }]", ["bundles[0]", "tolerance = 'x'", "a number"]),
        ("bundles = [{ path = 'b', budgets = { load = 1 } }]", ["bundles[0].budgets", "'load'", "'load_s'"]),
        ("bundles = [{ path = 'b', budgets = { load_s = '1' } }]", ["bundles[0].budgets", "load_s = '1'", "a number"]),
        ("providers = 'cpu'", ["providers = 'cpu'", "a list of providers"]),
        ("modes = [1]", ["modes = [1]", "a list of parity modes"]),
        ("tolerance = -1", ["tolerance = -1", "at least 0"]),
        ("tolerance = true", ["tolerance = True"]),
        ("tolerance = nan", ["tolerance = nan"]),
        ("reference = 3", ["reference = 3", "module:attribute"]),
        ("baseline = ''", ["baseline = ''", "a file"]),
        ("max-regression = 10", ["max-regression = 10", "10% or 0.1"]),
        ("max-regression = 'ten'", ["max-regression = 'ten'"]),
        ("budgets = { decode = 3 }", ["budgets", "'decode'", "did you mean 'decode_ms'?"]),
        ("budgets = { decode_ms = 0 }", ["decode_ms = 0", "above 0"]),
        ("budgets = { decode_ms = inf }", ["decode_ms = inf"]),
        ("budgets = 3", ["budgets", "table"]),
        ("length = 1", ["length = 1", "at least 2"]),
        ("length = 2.5", ["length = 2.5"]),
        ("seed = -1", ["seed = -1"]),
        ("threads = true", ["threads = True"]),
        ("latency = 'no'", ["latency = 'no'", "true or false"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["pe-onnx.toml", "pyproject.toml"])
def test_what_a_suite_may_not_say(name: str, text: str, words: list[str], tmp_path: Path) -> None:
    table = "check" if name == "pe-onnx.toml" else "tool.pe-onnx.check"
    bundles = "" if text.startswith(("bundles", "bundels")) else "bundles = ['a']"
    text = f"[{table}]\n{text}\n{bundles}\n"
    with pytest.raises(ConfigError) as refused:
        read_suite(write(tmp_path, text, name))
    for word in [str(tmp_path / name), *words]:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_suite_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_suite(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="directory"):
        read_suite(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[check]\nbundles = ['\xe9']\n")
    with pytest.raises(ConfigError, match="no valid TOML"):
        read_suite(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("given", "share"),
    [("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), (" 2.5 %", 0.025), ("100%", 1.0), (1, 1.0), ("1e-2", 0.01)],
)
def test_shares(given: object, share: float) -> None:
    assert parse_share(given) == pytest.approx(share)


@pytest.mark.parametrize(
    "given", ["", "%", "10", 10, "ten", "-5%", "0", 0, "0%", "nan", "nan%", "inf", "101%", True, None, "5%%"]
)
def test_what_is_no_share(given: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_share(given)


def test_patterns(tmp_path: Path) -> None:
    for name in ("b/one", "b/two", "b/[x]", "deep/er/three", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b" / "baseline.json").touch()
    (tmp_path / "deep/er/three/manifest.json").touch()

    def names(*patterns: str) -> list[str]:
        return [str(Path(entry.path).relative_to(tmp_path)) for entry in expand(map(Entry, patterns), tmp_path)]

    assert names("b/*") == ["b/[x]", "b/one", "b/two"]
    assert names("b/two", "b/*") == ["b/two", "b/[x]", "b/one"], "each once, where it was named first"
    assert names("b/[x]") == ["b/[x]"], "a folder that is there is no pattern"
    assert names("b/t?o", "nothing") == ["b/two", "nothing"], "what is not there is a failure of its own"
    assert names("deep/**") == ["deep/er/three"], "not the folders on the way"
    assert names(str(tmp_path / "b" / "o*")) == ["b/one"]
    with pytest.raises(ConfigError, match=r"c/\* matches no folder"):
        names("c/*")
    with pytest.raises(ConfigError, match="matches no folder"):
        names("b/*.json")
    assert list(expand([Entry("c/*")], tmp_path, may_be_empty=True)) == []


def test_an_exception_to_a_pattern(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    entries = expand([Entry("*", tolerance=1.0), Entry("two", tolerance=2.0)], tmp_path)
    assert [(Path(entry.path).name, entry.tolerance) for entry in entries] == [("one", 1.0), ("two", 2.0)]
    entries = expand([Entry("*", tolerance=1.0)], tmp_path)
    assert {entry.tolerance for entry in entries} == {1.0}


def test_budgets_over_others() -> None:
    assert Budgets(load_s=1).over(Budgets(load_s=2, decode_ms=3)) == Budgets(load_s=1, decode_ms=3)
    assert Budgets(load_s=1).given() == {"load_s": 1}
