"""Share of time by operator and by part of the decoder, from onnxruntime's profile.

onnxruntime notes when each node's kernel began and how long it took, and that takes time itself: 5 to 20 us a node,
which in a small model is more than most nodes. The quickest node shows about how much of it falls into each
kernel's time; this is taken off all of them, but for the microsecond to which the profile counts. Shares are of what
remains, and hold for the optimised graph that runs, in which nodes are fused and our functions are inlined.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pe_onnx.attribution import PARTS, Attribution
from pe_onnx.contestants import BundleContestant
from pe_onnx.errors import BundleError
from pe_onnx.graph_nodes import read_graph

KERNEL = "_kernel_time"
RUN = "model_run"
RESOLUTION_US = 1.0
STEPS, PROMPTS = 24, 5
"""Measured of each phase at most."""
LEAST_REPETITIONS = 3

Event = Mapping[str, Any]
NodeTimes = dict[tuple[str, str], float]
"""Name and operator of a node to microseconds."""


@dataclass
class OperatorTime:
    """All nodes of one operator in one part."""

    part: str
    operator: str
    """As it runs: ``RotaryEmbedding``, ``QuickGelu``, ..."""
    nodes: int
    us: float
    """Of a step or a prompt, the profiler's own time taken off."""
    share: float


@dataclass
class Profile:
    """Where the time of a phase goes. Shares sum to 1."""

    phase: str
    """``decode`` or ``prefill``."""
    depth_tokens: int | None
    """Of a prefill None."""
    repetitions: int
    """Steps or prompts, of which the median is taken node by node."""
    us: float
    profiler_us_per_node: float
    """Taken off each node."""
    parts: dict[str, float]
    """Share of each part: encoding, attention, projections, norms, masks and lengths, rest."""
    operators: list[OperatorTime]
    """The costliest first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def profile(
    folder: str | Path,
    provider: str,
    threads: int,
    depths: Sequence[int],
    prompt: list[int],
    source: list[int] | None,
    budget_s: float,
) -> list[Profile]:
    """Profile the decoder of a bundle: a prompt, and a decode step at each depth.

    Raises BundleError for a model or a profile that cannot be read.
    """
    with tempfile.TemporaryDirectory() as place:
        contestant = BundleContestant(folder, provider, threads, source, profile=Path(place, "profile"))
        attribution = Attribution(read_graph(contestant.session.model))
        phases: list[tuple[str, int | None, list[int]]] = []
        until = time.perf_counter()
        runs = _counted(contestant)
        for i, depth in enumerate((None, *depths)):
            until += budget_s / (len(depths) + 1)
            if depth is not None:
                contestant.begin(depth)
            call: Callable[[], Any] = contestant.step if depth is not None else lambda: contestant.first_token(prompt)
            call()  # onnxruntime allocates its memory
            bounds = [runs()]
            most = STEPS if i else PROMPTS
            while len(bounds) <= LEAST_REPETITIONS or (len(bounds) <= most and time.perf_counter() < until):
                call()
                bounds.append(runs())
            phases.append(("prefill" if depth is None else "decode", depth, bounds))
        events = _read(contestant.session.end_profile())
    by_run = node_times(events)
    return [
        summarise(phase, depth, [by_run[a:b] for a, b in itertools.pairwise(bounds)], attribution)
        for phase, depth, bounds in phases
    ]


def _counted(contestant: BundleContestant) -> Callable[[], int]:
    """A function that says how often the decoder's graph has run."""
    session, count = contestant.session, [0]
    run = session.run

    def counting(binding: Any, recorded: int | None = None) -> None:
        count[0] += 1
        run(binding, recorded)

    session.run = counting  # type: ignore[method-assign]
    return lambda: count[0]


def _read(path: Path) -> list[Event]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"onnxruntime's profile {path} cannot be read: {error}") from error


def node_times(events: Iterable[Event]) -> list[NodeTimes]:
    """Of each run of the graph in order, what each node took itself, without the nodes of a subgraph in it."""
    events = list(events)
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == RUN)
    kernels = (e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL))
    result: list[NodeTimes] = [defaultdict(float) for _ in runs]
    at = 0
    outer: list[tuple[float, int, tuple[str, str]]] = []
    for event in sorted(kernels, key=lambda e: (e["ts"], -e["dur"])):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while at + 1 < len(runs) and begin >= runs[at + 1][0]:
            at += 1
        if not runs or begin < runs[at][0]:
            continue
        key = event["name"].removesuffix(KERNEL), event.get("args", {}).get("op_name", "")
        while outer and outer[-1][0] <= begin:
            outer.pop()
        if outer and end <= outer[-1][0] and event["dur"] < outer[-1][1]:
            result[at][outer[-1][2]] -= event["dur"]
        result[at][key] += event["dur"]
        outer.append((end, event["dur"], key))
    return result


def summarise(
    phase: str, depth_tokens: int | None, repetitions: Sequence[Sequence[NodeTimes]], attribution: Attribution
) -> Profile:
    """Repetitions, each of one run or of several (a prompt in chunks), to shares. Raises BundleError where none ran."""
    series: dict[tuple[str, str], list[float]] = defaultdict(list)
    for runs in repetitions:
        total: NodeTimes = defaultdict(float)
        for run in runs:
            for key, us in run.items():
                total[key] += us
        for key, us in total.items():
            series[key].append(us)
    if not series:
        raise BundleError("onnxruntime's profile has no nodes in it")
    runs_each = max(len(runs) for runs in repetitions)
    medians = {key: statistics.median(values) for key, values in series.items()}
    own = max(min(medians.values()) / runs_each - RESOLUTION_US, 0.0)
    times = {key: max(us - own * runs_each, RESOLUTION_US) for key, us in medians.items()}
    whole = sum(times.values())
    parts = dict.fromkeys(PARTS, 0.0)
    grouped: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, operator), us in times.items():
        part = attribution.part(name, operator)
        parts[part] += us / whole
        grouped[part, operator].append(us)
    operators = [
        OperatorTime(part, operator, len(values), sum(values), sum(values) / whole)
        for (part, operator), values in grouped.items()
    ]
    operators.sort(key=lambda operator: -operator.us)
    return Profile(phase, depth_tokens, len(repetitions), whole, own, parts, operators)
