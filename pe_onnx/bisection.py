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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_onnx.bundle import ENCODER
from pe_onnx.divergence import Divergence
from pe_onnx.errors import BundleError, ConfigError
from pe_onnx.failing_run import Failure, first_failure
from pe_onnx.parity import DEFAULT_TOKENS, Comparison, prepare
from pe_onnx.seq2seq_parity import BEAMS

if TYPE_CHECKING:
    from pe_onnx.blame import Blame
    from pe_onnx.replay import Run
    from pe_onnx.twin import Twin

Array = np.ndarray[Any, Any]

LAYER = re.compile(r"(?:.*\.)?\d+(?=[./])")
"""The beginning of a scoped name up to the number of its layer."""

INNER_FACTOR = 4.0
"""Values inside the graph may be this many times further from PyTorch than the logits may: some are of fewer terms."""

CAST = re.compile(r"/to_copy(_\d+)?$")
"""A half-precision trace has casts that the float32 one has not: their numbers mean nothing between the two."""


def bisect(
    folder: str | Path,
    reference: Any = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    tokens: int = DEFAULT_TOKENS,
    modes: Sequence[str] | None = None,
    provider: str = "cpu",
    threads: int = 0,
    tolerance: float | None = None,
    seed: int = 0,
) -> Divergence | None:
    """The first place where the bundle's values are not PyTorch's; None where no mode exceeds the tolerance.

    reference: what ``check_parity`` takes; of a bundle made from a module, that module. The others as of
    ``check_parity``; modes are searched in their order, beam search aside, which is made of the decoder's steps.

    Raises CheckpointError where what the bundle was traced from cannot be had, and BundleError where the bundle
    differs and no value inside it does: its message says what was ruled out.
    """
    compared = prepare(
        folder,
        reference,
        rows=rows,
        tokens=tokens,
        modes=modes,
        provider=provider,
        tolerance=tolerance,
        seed=seed,
        threads=threads,
    )
    if compared.modes == [BEAMS]:
        raise ConfigError(
            f"mode {BEAMS} is made of the decoder's steps: search one of its modes, such as whole or steps"
        )
    failure = next((found for mode in compared.modes if (found := first_failure(compared, mode))), None)
    if failure is None:
        return None
    from pe_onnx import twin

    return _Search(compared, twin.of_graph(compared.bundle, failure.file, reference), failure, provider, threads).find()


class _Search:
    """Of one failure, over the replays of its runs."""

    def __init__(self, compared: Comparison, twin: Twin, failure: Failure, provider: str, threads: int) -> None:
        from pe_onnx.exposed import ExposedGraph
        from pe_onnx.replay import Replay

        self.compared, self.failure, self.twin = compared, failure, twin
        self.options: dict[str, Any] = {"provider": provider, "threads": threads}
        self.allowed = compared.allowed.error * failure.spread
        self.limit = INNER_FACTOR * compared.allowed.error
        self.graph = ExposedGraph(compared.bundle, failure.file)
        encoded: dict[str, tuple[Array, Array]] = {}
        if compared.requests is not None and failure.file != ENCODER:
            case = compared.requests.padded(failure.rows)
            own = compared.requests.encode(case.ids, case.mask).astype(compared.bundle.cache_dtype)
            own[case.mask == 0] = 0  # means nothing there, on either side
            encoded = {"encoder_hidden_states": (own, case.want), "encoder_attention_mask": (case.mask, case.mask)}
        self.replay = Replay(self.graph, twin, failure.feeds, len(failure.rows), encoded)
        order = [v.name or "" for node in self.graph.nodes for v in node.outputs]
        self.matched = [name for name in order if name in twin.nodes]
        if compared.bundle.manifest["dtype"] != "fp32":
            self.matched = [name for name in self.matched if not CAST.search(name)]
        if not any("/" in name for name in self.matched):
            raise BundleError(f"bundle {compared.bundle.folder} has no scoped names to find values by: export it again")
        self.ends = self._ends()
        self.apart: float | None = None
        """How far the module it was traced from is from the reference, where that can be told."""

    def find(self) -> Divergence:
        """Raises BundleError where no value inside the graph differs."""
        for optimize in (False, True):
            for run in self.replay.runs(self.ends, optimize=optimize, **self.options):
                if run.refusal is not None:
                    return self._refused(run, run.refusal, optimize)
                first = next((name for name in self.ends if self._differs(run, name)), None)
                if first is not None:
                    return self._within(run, first, optimize)
                self._note_apart(run)
        raise BundleError(self._ruled_out())

    def _ends(self) -> list[str]:
        """The last value of each layer, and the graph's outputs."""
        ends: dict[str, str] = {}
        for name in self.matched:
            layer = LAYER.match(name)
            if layer is not None:
                ends[layer[0]] = name
        last = {*ends.values(), *self.graph.outputs}
        return [name for name in self.matched if name in last]

    def _differs(self, run: Run, name: str) -> bool:
        """What the mode compares is compared as the mode does it, of the reference's spread."""
        found = run.difference(name)
        if found is None:
            return False
        if name == self.graph.outputs[0]:
            return not found.max_abs <= self.allowed
        return not found.relative <= self.limit

    def _within(self, run: Run, first: str, optimize: bool) -> Divergence:
        """The first value that differs, of those that ``first`` alone is computed from."""
        ends = self.ends
        # keys and values may agree where the attention that hands them on differs
        agreed = self.graph.ancestors(e for e in ends[: ends.index(first)] if not e.startswith("present."))
        region = self.graph.ancestors([first]) - agreed
        names = [name for name in self.matched if name in region]
        run = self.replay.once(run, names, optimize=optimize, **self.options)
        value = next((name for name in names if self._differs(run, name)), first)
        found = self._divergence(run, self._blame(value), optimize)
        if value == self.graph.outputs[0] and not found.remark:
            found.remark = f"no value before it is off by more than {self.limit:.0e} of its own size: it adds up"
        return found

    def _refused(self, run: Run, refusal: BundleError, optimize: bool) -> Divergence:
        """The first node without which onnxruntime still runs what stands before it."""
        low, high = 0, len(self.graph.nodes)
        while high - low > 1:
            middle = (low + high) // 2
            last = next(v.name or "" for v in self.graph.nodes[middle - 1].outputs if v.name)
            try:
                self.replay.once(run, [last], nodes=middle, optimize=optimize, **self.options)
                low = middle
            except BundleError:
                high = middle
        node = self.graph.nodes[low]
        names = [v.name or "" for v in node.outputs if v.name]
        value = next((name for name in names if name in self.twin.nodes), names[0])
        return self._divergence(run, self._blame(value), optimize, nodes=low, refusal=str(refusal))

    def _blame(self, value: str) -> Blame:
        from pe_onnx.blame import Blame

        return Blame(self.graph, self.twin, self.limit, value, {*self.matched})

    def _divergence(
        self, run: Run, blame: Blame, optimize: bool, nodes: int | None = None, refusal: str | None = None
    ) -> Divergence:
        names = [name for name in blame.exposed if nodes is None or name not in blame.made]
        run = self.replay.once(
            run, names, optimize=optimize, counterparts=blame.counterparts, nodes=nodes, **self.options
        )
        slot = self._slot(run) or 0
        return blame.divergence(
            run,
            bundle=str(self.compared.bundle.folder),
            mode=self.failure.mode,
            row=int(self.failure.row),
            position=int(self.failure.position),
            step=run.index,
            step_tokens=run.feed.valid.shape[1],
            step_position=run.first_position(slot),
            refusal=refusal,
            optimized=optimize,
        )

    def _slot(self, run: Run) -> int | None:
        """The failing row's place in a run, None where it takes no part."""
        slot = self.failure.rows.index(self.failure.row) - run.feed.row
        return slot if 0 <= slot < len(run.feed.valid) else None

    def _note_apart(self, run: Run) -> None:
        """Of the run that made the logits which are not the reference's."""
        slot, expected = self._slot(run), self.failure.expected
        if slot is None or expected is None:
            return
        behind = self.failure.position - run.first_position(slot)
        columns = np.flatnonzero(run.feed.valid[slot])
        if 0 <= behind < columns.size:
            logits = run.twin[self.graph.outputs[0]][slot]
            if len(logits) == 1 and behind != columns.size - 1:
                return  # those of the last token alone
            self.apart = float(np.abs(logits[0 if len(logits) == 1 else columns[behind]] - expected).max())

    def _ruled_out(self) -> str:
        failure = self.failure
        where = f"mode {failure.mode}, row {failure.row}, position {failure.position}"
        begin = f"{self.compared.bundle.folder} differs from PyTorch in {where}, and no value inside its graph does"
        if self.apart is not None and not self.apart <= self.allowed:
            return (
                f"{begin}: the module it was traced from is off itself, by {self.apart:.2g}, given the same tokens, "
                f"mask and positions; either these are wrong or the reference is another model's"
            )
        return (
            f"{begin} when it is replayed run by run, with and without graph optimisations: what remains is the cache "
            f"in place (past and present are one buffer) or a fusion that exposed values prevent"
        )
