"""What the tests of `pe-onnx check` share: a bundle that is wrong inside, and parts that answer at once."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import check_documents
import onnx
import pytest
from onnx import numpy_helper

WHERE = "decoder.blocks.0.attention, step 3: rotary, max abs 0.21 (up to here 1e-07)"


def rewrite(folder: Path, model: onnx.ModelProto) -> None:
    """Put a model in place of a bundle's, checksum and all: only what it computes can tell."""
    onnx.save(model, folder / "model.onnx")
    content = (folder / "model.onnx").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def broken_twin(bundle: Path, folder: Path) -> Path:
    """A rope bundle whose frequencies are those of another theta."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx")
    (frequencies,) = [x for x in model.graph.initializer if x.name.endswith("inverse_frequency")]
    frequencies.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(frequencies) * 0.9, frequencies.name))
    rewrite(folder, model)
    return folder


@dataclass
class Parts:
    """Stand in place of what measures: what they answer, and what they were asked."""

    decode_ms: dict[int, float] = field(default_factory=lambda: {128: 4.0, 1024: 5.0})
    prefill_tokens_per_s: float | None = 2000.0
    peak_memory_bytes: int | None = 50_000_000
    intervals: bool = True
    change: float = 0.02
    apart: float = 0.0
    """By how much the session without optimisations differs from the others."""
    fallbacks: list[dict[str, str]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    """What stands in the file."""
    written: dict[str, Any] | None = None
    bench_error: Exception | None = None
    bisected: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def bench(self, folder: Path, **options: Any) -> Any:
        self.asked.append(("bench", {"folder": folder, **options}))
        if self.bench_error is not None:
            raise self.bench_error

        def around(value: float) -> list[float] | None:
            return [0.9 * value, 1.1 * value] if self.intervals else None

        decode = [
            {"depth_tokens": depth, "median_ms": ms, "interval_ms": around(ms)} for depth, ms in self.decode_ms.items()
        ]
        own = {
            "name": Path(folder).name,
            "load_s": 0.5,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "prefill_interval_tokens_per_s": [1900.0, 2100.0] if self.intervals else None,
            "first_token_ms": 60.0,
            "first_token_interval_ms": [55.0, 65.0] if self.intervals else None,
            "decode": decode,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        return SimpleNamespace(to_dict=lambda: check_documents.bench(own))

    def compare_sessions(self, folder: Path, providers: Any = ("cpu",), **options: Any) -> Any:
        self.asked.append(("sessions", {"folder": folder, "providers": providers, **options}))
        names = ["cpu, optimised, all cores", "cpu, not optimised, all cores", "cpu, optimised, 1 thread"]
        differences = [[0.0 if i == j else self.apart * (1 in (i, j)) for j in range(3)] for i in range(3)]
        return check_documents.matrix(names, differences, self.fallbacks)

    def measure(self, folder: Path, **options: Any) -> Any:
        self.asked.append(("measure", {"folder": folder, **options}))
        return {"of": Path(folder).name}

    def compare(self, folder: Path, baseline: Any, max_regression: float, **options: Any) -> Any:
        self.asked.append(("compare", {"folder": folder, "baseline": baseline, **options}))
        return check_documents.regression(self.change, max_regression)

    def read_baselines(self, path: Path) -> dict[str, Any]:
        return self.baseline

    def write_baselines(self, path: Path, values: dict[str, Any]) -> None:
        self.written = values

    def bisect(self, folder: Path, reference: Any = None, **options: Any) -> Any:
        self.bisected.append({"folder": folder, "reference": reference, **options})
        return SimpleNamespace(text=WHERE, to_dict=lambda: check_documents.divergence(WHERE))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In place of the modules that a check imports when it comes to them."""
        regression = {name: getattr(self, name) for name in ("measure", "compare", "read_baselines", "write_baselines")}
        for name, members in {
            "latency": {"bench": self.bench},
            "session_matrix": {"compare_sessions": self.compare_sessions},
            "regression": regression,
            "bisection": {"bisect": self.bisect},
        }.items():
            monkeypatch.setitem(sys.modules, f"pe_onnx.{name}", SimpleNamespace(**members))  # type: ignore[arg-type]
