"""Sessions: what a start costs with and without what an earlier one left, and which of onnxruntime's settings pay.

Starts run in processes of their own, in turns: loads (``pe_onnx.load``, without Python's imports) by wall and
processor time, the peak of a short generation (Linux's VmHWM), and what of it is private, which other processes cannot
share. ``packed`` are weights in the order that kernels read, as onnxruntime saves them beside the graph. Settings are
sessions in one process that take turns, as ratios to those of pe-onnx.

    python benchmarks/session.py BUNDLE... [--rounds 5] [--seconds 60] [-o benchmarks/session.json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

PROMPT_TOKENS, NEW_TOKENS, DEPTH = 128, 32, 256
STARTS = ("all checked, nothing kept", "first", "later")
GRAPHS = ("as exported", "optimised", "optimised, weights packed")
OURS = "as pe-onnx sets it"
SETTINGS: dict[str, dict[str, str]] = {
    OURS: {},
    "onnxruntime's spinning": {"session.intra_op.spin_duration_us": ""},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning for 20 us": {"session.intra_op.spin_duration_us": "20"},
    "spinning for 1 ms": {"session.intra_op.spin_duration_us": "1000"},
    "one thread": {"threads": "1"},
    "threads on cores": {"threads": "2", "session.intra_op_thread_affinities": "2"},
    "no arena": {"enable_cpu_mem_arena": ""},
    "no memory pattern": {"enable_mem_pattern": ""},
}
"""Session options; ``threads``, and attributes to switch off, are no options of the session."""


def start(folder: str, prepare: bool) -> dict[str, float]:
    """In a process of its own: load, and generate a few tokens."""
    begin = time.perf_counter()
    import tokenizers  # noqa: F401

    import pe_onnx.generate

    imported = time.perf_counter()
    used = time.process_time()
    model = pe_onnx.load(folder, prepare=prepare)
    result = {"load_s": time.perf_counter() - imported, "load_cpu_s": time.process_time() - used}
    model.generate(list(range(5, 5 + PROMPT_TOKENS)), NEW_TOKENS, ignore_eos=True)
    return {"import_s": imported - begin, **result, **memory()}


def open_graph(path: str, weights: str, optimised: bool) -> dict[str, float]:
    """In a process of its own: a session of onnxruntime alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    model: Any = Path(path).read_bytes() if optimised else path
    begin, used = time.perf_counter(), time.process_time()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result = {"open_s": time.perf_counter() - begin, "open_cpu_s": time.process_time() - used, **memory()}
    del session
    return result


def memory() -> dict[str, float]:
    from pe_onnx.fresh_process import status_bytes

    return {"peak_bytes": status_bytes("VmHWM") or 0, "private_bytes": status_bytes("RssAnon") or 0}


def optimise(model: Path, folder: Path, packed: bool) -> None:
    """The optimised graph as ``folder / "graph.onnx"``; packed: with weights of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "graph.onnx")
    if packed:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def starts(bundle: Path, rounds: int) -> dict[str, Any]:
    from pe_onnx.bundle import read_bundle
    from pe_onnx.fresh_process import call_fresh
    from pe_onnx.prepared import FOLDER

    model = read_bundle(bundle, verify=False).model
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*STARTS, *GRAPHS)}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in GRAPHS[1:]}
        for name, folder in folders.items():
            folder.mkdir()
            optimise(model, folder, packed="packed" in name)
        for number in range(rounds):
            for name in STARTS:
                if name == "first":
                    shutil.rmtree(bundle / FOLDER, ignore_errors=True)
                runs[name].append(call_fresh("session:start", folder=str(bundle), prepare=name != STARTS[0]))
            for name in GRAPHS:
                path = folders[name] / "graph.onnx" if name in folders else model
                weights = folders[name] if "packed" in name else bundle
                runs[name].append(
                    call_fresh(
                        "session:open_graph",
                        path=str(path),
                        weights=str(weights.resolve()),
                        optimised=name in folders,
                    )
                )
            click.echo(f"{bundle.name}: starts, round {number + 1} of {rounds}", err=True)
        added = {name: sum(p.stat().st_size for p in folder.iterdir()) for name, folder in folders.items()}
    medians = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    for name, size in added.items():
        medians[name]["added_bytes"] = size
    return medians


def contestant(bundle: Path, setting: dict[str, str]) -> Any:
    """The bundle in a session with a setting."""
    from pe_onnx import session
    from pe_onnx.contestants import BundleContestant

    plain = session._session_options

    def changed(*args: Any, **kwargs: Any) -> Any:
        options = plain(*args, **kwargs)
        for key in setting:
            if key.startswith("enable_"):
                setattr(options, key, False)
        return options

    session._session_options = changed
    try:
        given = {key: value for key, value in setting.items() if key.startswith("session.")}
        return BundleContestant(bundle, threads=int(setting.get("threads", 0)), options=given)
    finally:
        session._session_options = plain


def settings(bundle: Path, seconds: float) -> dict[str, Any]:
    from pe_onnx.intervals import median_interval, ratio_interval
    from pe_onnx.turns import in_turns

    made = {name: contestant(bundle, setting) for name, setting in SETTINGS.items()}
    prompt = list(range(5, 5 + PROMPT_TOKENS))
    result: dict[str, Any] = {name: {} for name in SETTINGS}

    def timed(call: Callable[[], object]) -> Callable[[], tuple[float, ...]]:
        def run() -> tuple[float, ...]:
            begin, used = time.perf_counter(), time.process_time()
            call()
            return time.perf_counter() - begin, time.process_time() - used

        return run

    for what, least in (("prefill", 5), ("decode", 20)):
        calls = {}
        for name, each in made.items():
            if what == "decode":
                each.begin(DEPTH)
            calls[name] = timed(each.step if what == "decode" else partial(each.first_token, prompt))
        times = in_turns(calls, time.perf_counter() + seconds / 2, 0.01, least, 500).times
        for kind, index in (("ms", 0), ("cpu_ms", 1)):
            series = {name: [1000 * one[index] for one in of] for name, of in times.items()}
            for name, values in series.items():
                ratio = ratio_interval(values, series[OURS])
                result[name][f"{what}_{kind}"] = median_interval(values).median
                result[name][f"{what}_{kind}_tenth"] = sorted(values)[len(values) // 10]
                result[name][f"{what}_{kind}_ratio"] = [ratio.median, *(ratio.interval or (None, None))]
        result["turns"] = {**result.get("turns", {}), what: len(times[OURS])}
    return result


def peaks(bundle: Path) -> dict[str, Any]:
    """Most memory of a prompt and a step, with and without onnxruntime's arena and memory pattern."""
    from pe_onnx.fresh_process import call_fresh

    return {
        name: call_fresh("session:setting_peak", folder=str(bundle), name=name)
        for name in (OURS, "no arena", "no memory pattern")
    }


def setting_peak(folder: str, name: str) -> dict[str, float]:
    """In a process of its own."""
    import gc

    made = contestant(Path(folder), SETTINGS[name])
    gc.collect()
    made.first_token(list(range(5, 5 + PROMPT_TOKENS)))
    made.begin(DEPTH)
    made.step()
    return memory()


def host_time(bundle: Path, steps: int = 2000) -> dict[str, float]:
    """Of a greedy step, the part that is not onnxruntime's: the cache's, binding included, and the sampler's."""
    import numpy as np

    import pe_onnx
    from pe_onnx.sampling import Sampler, SamplingOptions

    model = pe_onnx.load(bundle, verify=False, threads=1)
    cache = model.cache(1)
    cache.reserve(DEPTH + steps)
    logits = np.stack(cache.prefill([list(range(5, 5 + DEPTH))]))
    sampler = Sampler(SamplingOptions(), 1)
    model.session.run = lambda *_: None  # type: ignore[method-assign]
    active = np.array([True])
    spent: dict[str, list[float]] = {"cache_ms": [], "sampler_ms": []}
    for _ in range(steps):
        begin = time.perf_counter()
        cache.decode([7], active)
        middle = time.perf_counter()
        sampler.sample(logits, cache.tokens)
        spent["sampler_ms"].append(1000 * (time.perf_counter() - middle))
        spent["cache_ms"].append(1000 * (middle - begin))
    return {name: statistics.median(values) for name, values in spent.items()}


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, show_default=True, help="Starts of each kind.")
@click.option("--seconds", default=60.0, show_default=True, help="Of the settings of each bundle.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(bundles: tuple[Path, ...], rounds: int, seconds: float, output: Path) -> None:
    """Measure starts and settings of BUNDLES."""
    from pe_onnx.machine import describe_machine, versions

    sys.path.insert(0, str(Path(__file__).parent))  # for the processes of their own
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "tools": versions(),
        "rounds": rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "depth_tokens": DEPTH,
        "load_average": os.getloadavg()[0],
        "bundles": {},
    }
    for bundle in bundles:
        found = {"starts": starts(bundle, rounds), "host": host_time(bundle), "peaks": peaks(bundle)}
        found["settings"] = settings(bundle, seconds)
        result["bundles"][bundle.resolve().name] = found
        output.write_text(json.dumps(result, indent=2) + "\n")
        show(bundle.name, found)


def show(name: str, found: dict[str, Any]) -> None:
    click.echo(
        f"\n{name}: host {found['host']['cache_ms']:.3f} ms + sampler {found['host']['sampler_ms']:.3f} ms a step"
    )
    click.echo("| start | s | processor s | peak MB | private MB |\n|---|---:|---:|---:|---:|")
    for kind, one in found["starts"].items():
        wall, used = one.get("load_s", one.get("open_s")), one.get("load_cpu_s", one.get("open_cpu_s"))
        click.echo(
            f"| {kind} | {wall:.2f} | {used:.2f} | {one['peak_bytes'] / 1e6:.0f} | {one['private_bytes'] / 1e6:.0f} |"
        )
    click.echo("| setting | decode ms | tenth | ratio | processor | prefill ms | ratio | processor |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind in SETTINGS:
        one = found["settings"][kind]
        click.echo(
            f"| {kind} | {one['decode_ms']:.2f} | {one['decode_ms_tenth']:.2f} | {one['decode_ms_ratio'][0]:.2f} "
            f"| {one['decode_cpu_ms_ratio'][0]:.2f} | {one['prefill_ms']:.0f} | {one['prefill_ms_ratio'][0]:.2f} "
            f"| {one['prefill_cpu_ms_ratio'][0]:.2f} |"
        )
    for kind, one in found["peaks"].items():
        click.echo(f"{kind}: peak {one['peak_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
