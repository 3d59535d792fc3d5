"""The gate's decisions on synthetic measurements, and its files; that it measures at all, on a tiny bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Bundles

from pe_onnx import regression
from pe_onnx.errors import ConfigError, ExportError, PeOnnxError
from pe_onnx.regression import (
    Relative,
    compare,
    decide,
    measure,
    neighbours,
    read_baselines,
    write_baselines,
)
from pe_onnx.yardstick import Sizes

SIZES = Sizes(65_000_000, 2_600_000, 256, 64)


def relative(decode: float = 1.0, prefill: float = 1.0, spread: float = 0.0, seed: int = 0) -> Relative:
    """Eight processes' figures about these."""
    rng = np.random.default_rng(seed)
    ratios = {
        name: (center * (1 + spread * rng.standard_normal(8))).tolist()
        for name, center in (("decode", decode), ("prefill", prefill))
    }
    return Relative("cpu", 1, "processor", SIZES, ratios, {"onnxruntime": "1.32.0"}, {"processor": "A"})


def measurements(*values: Relative) -> Callable[[], Relative]:
    left = list(values)
    return lambda: left.pop(0)


def test_unchanged_passes_after_one_measurement() -> None:
    verdict = decide("b", relative(), 0.1, measurements(relative(1.02, 0.99)))
    assert verdict.passed
    assert verdict.change == pytest.approx(0.02)
    assert verdict.measure == "decode"
    assert verdict.first_changes is None
    assert verdict.text == "b: decode 2.0% slower, prefill 1.0% faster, 10% allowed"


@pytest.mark.parametrize(("decode", "prefill", "measure"), [(1.2, 1.0, "decode"), (0.9, 1.3, "prefill")])
def test_what_is_slower_twice_fails(decode: float, prefill: float, measure: str) -> None:
    slow = relative(decode, prefill)
    verdict = decide("b", relative(), 0.1, measurements(slow, slow))
    assert not verdict.passed
    assert verdict.measure == measure
    assert verdict.change == pytest.approx(max(decode, prefill) - 1)
    assert "confirmed by a second measurement" in verdict.text
    assert "\n" not in verdict.text
    assert len(verdict.measured.ratios["decode"]) == 16


def test_what_a_second_measurement_does_not_confirm_passes() -> None:
    verdict = decide("b", relative(), 0.1, measurements(relative(1.2), relative(0.98)))
    assert verdict.passed
    assert verdict.first_changes == pytest.approx({"decode": 0.2, "prefill": 0.0})
    assert "a first measurement said decode 20.0% slower" in verdict.text


def test_exactly_what_is_allowed_passes() -> None:
    assert decide("b", relative(), 0.5, measurements(relative(1.5))).passed


@pytest.mark.parametrize(("slow", "least", "most"), [(1.0, 0, 2), (1.18, 190, 200)])
def test_alarms_and_catches_at_the_spread_that_was_measured(slow: float, least: int, most: int) -> None:
    """200 runs at 6 % from process to process, the worst that was seen: at most 1 % false alarms, 95 % catches."""
    alarms = 0
    for i in range(200):
        first, second = relative(slow, slow, 0.06, 2 * i + 1), relative(slow, slow, 0.06, 2 * i + 2)
        alarms += not decide("b", relative(), 0.1, measurements(first, second)).passed
    assert least <= alarms <= most


def test_one_odd_process_does_not_count() -> None:
    """Where pages fall unluckily one process is off by a fifth throughout."""
    odd = relative()
    odd.ratios["decode"][3] = 1.4
    assert decide("b", relative(), 0.1, measurements(odd)).change == pytest.approx(0)


def test_another_machine_or_onnxruntime_is_said() -> None:
    other = relative()
    other.machine, other.tools = {"processor": "B"}, {"onnxruntime": "1.33.0"}
    text = decide("b", relative(), 0.1, measurements(other)).text
    assert "the baseline is of onnxruntime 1.32.0, this is 1.33.0" in text
    assert "the baseline is of another machine" in text


def test_neighbours_are_timed_in_turns() -> None:
    now, called = [0.0], []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            called.append(name)
            now[0] += seconds

        return run

    ratios = neighbours(call("bundle", 0.012), call("plain", 0.01), lambda: now[0], 6, float("inf"))
    assert ratios == pytest.approx([1.2] * 6)
    timed = called[4:]  # two calls of each before
    assert timed[:8] == ["plain", "bundle", "bundle", "plain"] * 2


def test_short_calls_are_repeated_within_a_sample() -> None:
    now, count = [0.0], [0]

    def run() -> None:
        count[0] += 1
        now[0] += 0.001

    neighbours(run, run, lambda: now[0], 3, float("inf"))
    assert count[0] == 2 * 2 + 3 * 2 * 4


def test_rounds_end_when_the_time_is_up() -> None:
    now = [0.0]

    def run() -> None:
        now[0] += 1

    assert len(neighbours(run, run, lambda: now[0], 100, 0.0)) == regression.LEAST_ROUNDS


def test_both_measures_share_the_time_of_a_process(monkeypatch: pytest.MonkeyPatch, bundles: Bundles) -> None:
    now, ends = [100.0], []

    def slow(above: object, below: object, clock: object, rounds: int, until: float) -> list[float]:
        ends.append(until)
        now[0] = max(now[0], until)
        return [1.0]

    monkeypatch.setattr(regression, "neighbours", slow)
    monkeypatch.setattr(regression.time, "monotonic", lambda: now[0])
    regression.sample(str(bundles("rope")), "cpu", 1, Sizes(1_000_000, 10_000, 16, 8)._asdict())
    assert ends == [100 + regression.PROCESS_S / 2, 100 + regression.PROCESS_S]


@pytest.mark.parametrize("name", ["AzureExecutionProvider", "OpenVINOExecutionProvider"])
def test_another_provider_has_no_gate(name: str, monkeypatch: pytest.MonkeyPatch, bundles: Bundles) -> None:
    """It is not taken for CUDA."""
    monkeypatch.setattr("pe_onnx.session.onnxruntime.get_available_providers", lambda: [name, "CPUExecutionProvider"])
    with pytest.raises(ConfigError, match=f"provider = '{name}': the gate is for cpu and cuda"):
        measure(bundles("rope"), provider=name)


def test_baselines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baselines = {"a@cpu": relative(1.1, 0.9, 0.05), "b@cpu": relative(2.0)}
    write_baselines(path, baselines)
    assert read_baselines(path) == baselines
    assert json.loads(path.read_text())["bundles"]["b@cpu"]["decode_ratio"] == 2.0
    write_baselines(path, {"b@cpu": relative(3.0)})
    assert list(read_baselines(path)) == ["b@cpu"]
    assert os.listdir(tmp_path) == ["baseline.json"]


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "baseline.json"
    write_baselines(path, {"a@cpu": relative()})
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_baselines(path, {"a@cpu": relative(2.0)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["baseline.json"]


WRONG_FILES = {
    "{": "is not JSON",
    "[]": "holds no pe-onnx latency baselines",
    '{"a": 1}': "holds no pe-onnx latency baselines",
    '{"kind": "pe-onnx latency baselines", "format": 0}': "has format 0, this pe-onnx reads 1",
    '{"kind": "pe-onnx latency baselines", "format": 1, "bundles": {"a@cpu": {}}}': "the entry 'a@cpu' is damaged",
    '{"kind": "pe-onnx latency baselines", "format": 1, "bundles": {"a@cpu": 7}}': "the entry 'a@cpu' is damaged",
    '{"kind": "pe-onnx latency baselines", "format": 1, "bundles": [7]}': "bundles",
}


@pytest.mark.parametrize(("content", "words"), WRONG_FILES.items())
def test_a_wrong_baseline_file_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_baselines(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; make one with --update-baseline"):
        read_baselines(tmp_path / "nothing.json")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot write .*file/baseline.json: "):
        write_baselines(tmp_path / "file" / "baseline.json", {})


def test_ratios_that_are_none_are_refused() -> None:
    for wrong in ([], [0.0], [-1.0]):
        values = relative().to_dict()
        values["ratios"]["decode"] = wrong
        with pytest.raises(ValueError, match="positive"):
            Relative.from_dict(values)


def test_a_measurement_takes_processes_enough_for_an_interval(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the budget is out at once."""
    monkeypatch.setattr(regression, "call_fresh", lambda *_, **__: {"decode": 1.0, "prefill": 1.0})
    measured = measure(bundles("rope"), budget_s=1e-9)
    assert measured.estimate("decode").coverage >= 0.95
    assert decide("b", measured, 0.1, measurements(measured)).interval == (0, 0)


def test_it_measures_a_bundle_against_its_own_baseline(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "LEAST_PROCESSES", 1)
    folder = bundles("learned", config={"max_position_embeddings": 32})
    baseline = measure(folder, budget_s=1e-9)
    assert baseline.yardstick.depth_tokens == 31
    assert baseline.yardstick.prompt_tokens == 32
    assert all(len(series) == 1 and series[0] > 0 for series in baseline.ratios.values())
    assert Relative.from_dict(json.loads(json.dumps(baseline.to_dict()))) == baseline
    verdict = compare(folder, baseline, 1e6, budget_s=1e-9)
    assert verdict.passed
    assert verdict.interval is None
    assert verdict.measured.yardstick == baseline.yardstick
    json.dumps(verdict.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_regression": 0.0}, "max_regression = 0.0"),
        ({"max_regression": float("nan")}, "max_regression = nan"),
        ({"threads": 2}, "the baseline is of provider 'cpu' with threads = 1"),
        ({"threads": -1}, "threads = -1"),
        ({"budget_s": 0.0}, "budget = 0.0"),
        ({"provider": "cup"}, "did you mean 'cpu'"),
    ],
)
def test_mistakes(bundles: Bundles, options: dict[str, object], words: str) -> None:
    with pytest.raises(PeOnnxError) as error:
        compare(bundles("rope"), relative(), **{"max_regression": 0.1, **options})  # type: ignore[arg-type]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_yardstick_longer_than_the_encoding_takes(bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match="256 tokens are more than the 32 positions"):
        measure(bundles("learned", config={"max_position_embeddings": 32}), yardstick=SIZES)
