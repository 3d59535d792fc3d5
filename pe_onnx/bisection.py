"""Where a bundle and PyTorch part: the first run, the first layer, the first operator.

The mode that fails is run once more and what the graph was given is noted. Those runs are replayed with values inside
the graph exposed, beside the module that the bundle was traced from, run operation by operation; a value finds its
counterpart by its scoped name. First at the end of each layer, then inside the first layer that differs, so that a
large model's values are never all in memory at once. Replays are without onnxruntime's graph optimisations, and with
them where nothing else differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_onnx import seq2seq_parity
from pe_onnx.bundle import ENCODER
from pe_onnx.cached_rows import Feed
from pe_onnx.divergence import Difference, Divergence
from pe_onnx.errors import BundleError
from pe_onnx.parity import DEFAULT_TOKENS, Comparison, compared_pairs, prepare

if TYPE_CHECKING:
    from pe_onnx.blame import Blame
    from pe_onnx.replay import Run
    from pe_onnx.twin import Twin

Array = np.ndarray[Any, Any]

LAYER = re.compile(r"(?:.*\.)?\d+(?=[./])")
"""The beginning of a scoped name up to the number of its layer."""

LEAST = 4.0
"""Values inside the graph may be this many times further from PyTorch than the logits may."""


def bisect(
    folder: str | Path,
    reference: Any = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    tokens: int | None = None,
    modes: Sequence[str] | None = None,
    provider: str = "cpu",
    threads: int = 0,
    tolerance: float | None = None,
    seed: int = 0,
) -> Divergence | None:
    """The first place where the bundle's values are not PyTorch's; None where no mode exceeds the tolerance.

    reference: a checkpoint's path, or the module that was exported, called with the graph contract's inputs; default
    what the manifest names. The others as of ``check_parity``; modes are searched in their order.

    Raises CheckpointError where the reference cannot be run operation by operation, and BundleError where the bundle
    differs and no value inside it does: its message says what was ruled out.
    """
    from pe_onnx.twin import plain, twins

    compared = prepare(
        folder,
        plain(reference, folder),
        rows=rows,
        tokens=DEFAULT_TOKENS if tokens is None else tokens,
        modes=modes,
        provider=provider,
        tolerance=tolerance,
        seed=seed,
        threads=threads,
    )
    failure = next((found for mode in compared.modes if (found := _first_failure(compared, mode))), None)
    if failure is None:
        return None
    return _Search(compared, twins(compared.bundle, reference), failure, provider, threads).find()


@dataclass
class Failure:
    """A row and position whose logits are not PyTorch's, and what the graph was given up to there."""

    mode: str
    row: int
    position: int
    rows: list[int]
    """Of the cache; the rows of the parity check."""
    feeds: list[Feed]
    expected: Array | None
    """None where onnxruntime refuses to run."""
    file: str


def _first_failure(compared: Comparison, mode: str) -> Failure | None:
    allowed = compared.allowed.error * compared.expected.spread
    if compared.requests is not None and mode in seq2seq_parity.MODES:
        return _encoder_failure(compared, mode)
    noted = compared.open_cache.noted = []
    file = compared.bundle.model.name
    try:
        for pair, want in compared_pairs(compared, mode):
            if not np.abs(pair.logits - want).max() <= allowed:
                cache, rows = next((c, r) for c, r in noted if c is pair.cache)
                return Failure(mode, pair.row, pair.position, rows, list(cache.feeds or []), want, file)
    except BundleError:  # onnxruntime refuses a run
        if not noted or not noted[-1][0].feeds:
            raise
        cache, rows = noted[-1]
        feeds = list(cache.feeds or [])
        return Failure(mode, rows[feeds[-1].row], int(cache.lengths.max()), rows, feeds, None, file)
    return None


def _encoder_failure(compared: Comparison, mode: str) -> Failure | None:
    """Of the encoder's output on one source; a beam search is of the decoder's steps, which other modes show."""
    requests = compared.requests
    if requests is None or mode != seq2seq_parity.ENCODER:
        return None
    for row in range(len(requests.sources)):
        ids, mask, want = requests.padded([row])
        if not np.abs(requests.encode(ids, mask) - want).max() <= compared.allowed.error * want.std():
            feed = Feed(0, {"input_ids": ids, "attention_mask": mask}, mask != 0)
            return Failure(mode, row, ids.size - 1, [row], [feed], want, ENCODER)
    return None


class _Search:
    """Of one failure, over the replays of its runs."""

    def __init__(
        self, compared: Comparison, twins: dict[str, Twin], failure: Failure, provider: str, threads: int
    ) -> None:
        from pe_onnx.exposed import ExposedGraph
        from pe_onnx.replay import Replay

        self.compared, self.failure = compared, failure
        self.options: dict[str, Any] = {"provider": provider, "threads": threads}
        self.limit = LEAST * compared.allowed.error
        self.graph, self.twin = ExposedGraph(compared.bundle, failure.file), twins[failure.file]
        encoded: dict[str, tuple[Array, Array]] = {}
        if compared.requests is not None and failure.file != ENCODER:
            ids, mask, hidden = compared.requests.padded(failure.rows)
            own = compared.requests.encode(ids, mask).astype(compared.bundle.cache_dtype)
            encoded = {"encoder_hidden_states": (own, hidden), "encoder_attention_mask": (mask, mask)}
        self.replay = Replay(self.graph, self.twin, failure.feeds, len(failure.rows), encoded)
        order = [v.name or "" for node in self.graph.nodes for v in node.outputs]
        self.matched = [name for name in order if name in self.twin.nodes]
        if not any("/" in name for name in self.matched):
            raise BundleError(f"bundle {compared.bundle.folder} has no scoped names to find values by: export it again")

    def find(self) -> Divergence:
        """Raises BundleError where no value inside the graph differs."""
        for optimize in (False, True):
            for run in self.replay.runs(self._ends(), optimize=optimize, **self.options):
                if run.refusal is not None:
                    return self._refused(run, run.refusal)
                first = next((name for name in self._ends() if self._differs(run.difference(name))), None)
                if first is not None:
                    return self._within(run, first, optimize)
        raise BundleError(self._ruled_out(run))

    def _blame(self, value: str) -> Blame:
        from pe_onnx.blame import Blame

        return Blame(self.graph, self.twin, self.limit, value)

    def _ends(self) -> list[str]:
        """The last value of each layer, and the graph's outputs."""
        ends: dict[str, str] = {}
        for name in self.matched:
            layer = LAYER.match(name)
            if layer is not None:
                ends[layer[0]] = name
        last = {*ends.values(), *self.graph.outputs}
        return [name for name in self.matched if name in last]

    def _differs(self, difference: Difference | None) -> bool:
        return difference is not None and not difference.relative <= self.limit

    def _within(self, run: Run, first: str, optimize: bool) -> Divergence:
        """The first value that differs, of those that ``first`` alone is computed from."""
        ends = self._ends()
        # keys and values may agree where the attention that hands them on differs
        agreed = self.graph.ancestors(e for e in ends[: ends.index(first)] if not e.startswith("present."))
        region = self.graph.ancestors([first]) - agreed
        names = [name for name in self.matched if name in region]
        run = self.replay.once(run, names, optimize=optimize, **self.options)
        value = next((name for name in names if self._differs(run.difference(name))), first)
        blame = self._blame(value)
        return self._divergence(run, blame, optimize)

    def _refused(self, run: Run, refusal: BundleError) -> Divergence:
        """The first node without which onnxruntime still runs what stands before it."""
        low, high = 0, len(self.graph.nodes)
        while high - low > 1:
            middle = (low + high) // 2
            last = next(v.name or "" for v in self.graph.nodes[middle - 1].outputs)
            try:
                self.replay.once(run, [last], nodes=middle, **self.options)
                low = middle
            except BundleError:
                high = middle
        node = self.graph.nodes[low]
        value = next((v.name for v in node.outputs if v.name in self.twin.nodes), node.outputs[0].name)
        blame = self._blame(value or "")
        return self._divergence(run, blame, False, nodes=low, refusal=str(refusal))

    def _divergence(
        self, run: Run, blame: Blame, optimize: bool, nodes: int | None = None, refusal: str | None = None
    ) -> Divergence:
        names = [name for name in blame.exposed if nodes is None or name not in blame.made]
        run = self.replay.once(
            run, names, optimize=optimize, counterparts=blame.counterparts, nodes=nodes, **self.options
        )
        ids = run.feed.inputs["input_ids"]
        positions = run.feed.inputs.get("position_ids", run.feed.valid.cumsum(1) - 1)
        return blame.divergence(
            run,
            bundle=str(self.compared.bundle.folder),
            mode=self.failure.mode,
            row=int(self.failure.row),
            position=int(self.failure.position),
            step=run.index,
            step_tokens=ids.shape[1],
            step_position=int(positions[0, 0]),
            refusal=refusal,
            optimized=optimize,
        )

    def _ruled_out(self, run: Run) -> str:
        failure = self.failure
        where = f"mode {failure.mode}, row {failure.row}, position {failure.position}"
        begin = f"{self.compared.bundle.folder} differs from PyTorch in {where}, and no value inside its graph does"
        twin = run.twin[self.graph.outputs[0]]
        slot = failure.rows.index(failure.row) - run.feed.row
        apart = float("inf")
        if failure.expected is not None and 0 <= slot < len(twin):
            rows = twin[slot].reshape(-1, failure.expected.shape[-1])
            apart = float(np.abs(rows - failure.expected).max(-1).min())
        if apart > self.compared.allowed.error * self.compared.expected.spread:
            return (
                f"{begin}: the module it was traced from is off itself, given the same tokens, mask and positions; "
                f"either these are wrong or the reference is another model's"
            )
        return (
            f"{begin} when it is replayed run by run, with and without graph optimisations: what remains is the cache "
            f"in place (past and present are one buffer) or a fusion that exposed values prevent"
        )
