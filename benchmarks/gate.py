"""The latency gate's false alarms and catches: runs on an unchanged bundle, and on one with a layer more.

One baseline is made at the start. Then the gate runs as ``pe-onnx check`` runs it, on the bundle itself and on the
same decoder with one more layer (5 to 6: a fifth more work), in turns, so that whatever else the machine does falls
on both. Counted are alarms on the first and on the second; the distribution of the measured changes says how far
they are from the allowance.

    python benchmarks/gate.py [--runs 50] [--max-regression 0.1] [-o benchmarks/gate.json]
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from pe_onnx import regression
from pe_onnx.machine import describe_machine, versions
from pe_onnx.relative import MEASURES, Relative

UNCHANGED, PLANTED = "unchanged", "one layer more"


def run_once(folder: Path, baseline: Relative, allowed: float, budget_s: float) -> dict[str, Any]:
    """One run of the gate."""
    begin = time.perf_counter()
    verdict = regression.compare(folder, baseline, allowed, budget_s=budget_s)
    return {
        "alarm": not verdict.passed,
        "changes": verdict.changes,
        "first_changes": verdict.first_changes,
        "processes": len(verdict.measured.ratios[MEASURES[0]]),
        "seconds": time.perf_counter() - begin,
        "load": os.getloadavg()[0],
    }


def distribution(values: list[float]) -> dict[str, float]:
    """Least, quartiles, greatest."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(zip(("least", "q25", "median", "q75", "greatest"), (min(values), *quarters, max(values)), strict=True))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs on one bundle."""
    return {
        "runs": len(runs),
        "alarms": sum(run["alarm"] for run in runs),
        "second_measurements": sum(run["first_changes"] is not None for run in runs),
        "change": {name: distribution([run["changes"][name] for run in runs]) for name in MEASURES},
        "seconds": distribution([run["seconds"] for run in runs]),
    }


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| bundle | alarms | runs | decode, median change | least..greatest | prefill, median change | least..greatest "
        "| s a run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in summaries.items():
        cells = []
        for measure in MEASURES:
            change = one["change"][measure]
            cells += [f"{change['median']:+.1%}", f"{change['least']:+.1%}..{change['greatest']:+.1%}"]
        seconds = one["seconds"]["median"]
        lines.append(f"| {name} | {one['alarms']} | {one['runs']} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


@click.command()
@click.option("--runs", default=50, show_default=True, help="On each of the two bundles.")
@click.option("--preset", default="small", show_default=True)
@click.option("--encoding", default="rope", show_default=True)
@click.option("--layers", default=5, show_default=True, help="Of the unchanged bundle; the other has one more.")
@click.option("--max-regression", default=0.1, show_default=True)
@click.option("--budget", default=regression.MEASUREMENT_S, show_default=True, help="Seconds of one measurement.")
@click.option("--baseline-budget", default=regression.BASELINE_S, show_default=True, help="Seconds of the baseline's.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(
    runs: int,
    preset: str,
    encoding: str,
    layers: int,
    max_regression: float,
    budget: float,
    baseline_budget: float,
    output: Path,
) -> None:
    """Measure the gate itself."""
    import pe_onnx

    results: dict[str, list[dict[str, Any]]] = {UNCHANGED: [], PLANTED: []}
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for name, count in ((UNCHANGED, layers), (PLANTED, layers + 1)):
            folders[name] = Path(place, f"{count}_layers")
            pe_onnx.export(encoding=encoding, preset=preset, config={"num_hidden_layers": count}, output=folders[name])
        click.echo("baseline", err=True)
        baseline = regression.measure(folders[UNCHANGED], budget_s=baseline_budget)
        for i in range(runs):
            for name, folder in folders.items():
                one = run_once(folder, baseline, max_regression, budget)
                results[name].append(one)
                changes = ", ".join(f"{measure} {x:+.1%}" for measure, x in one["changes"].items())
                verdict = "alarm" if one["alarm"] else "pass"
                again = ", measured twice" if one["first_changes"] else ""
                click.echo(
                    f"run {i + 1} of {runs}, {name}: {verdict}, {changes}{again}, {one['seconds']:.1f} s", err=True
                )
            summaries = {name: summarise(done) for name, done in results.items()}
            written = {
                "preset": preset,
                "encoding": encoding,
                "layers": layers,
                "max_regression": max_regression,
                "budget_s": budget,
                "tools": versions(),
                "machine": describe_machine(),
                "baseline": baseline.to_dict(),
                "summary": summaries,
                "runs": results,
            }
            output.write_text(json.dumps(written, indent=2) + "\n")
    click.echo(table(summaries))
    false, caught = summaries[UNCHANGED]["alarms"], summaries[PLANTED]["alarms"]
    click.echo(f"\nFalse alarms: {false} of {runs}. Planted slow-downs caught: {caught} of {runs}.")


if __name__ == "__main__":
    main()
