"""The runs of a cache once more, in onnxruntime and in PyTorch side by side, each side with keys and values of its own.

Values inside the graph are compared run by run. A run is what the runtime had fed: tokens, mask and positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import ENCODER
from pe_onnx.cached_rows import Feed
from pe_onnx.divergence import Array, Difference, difference
from pe_onnx.errors import BundleError
from pe_onnx.exposed import ExposedGraph
from pe_onnx.twin import Twin

Past = dict[str, Array]


@dataclass
class Run:
    """One run on both sides."""

    index: int
    feed: Feed
    bundle: Mapping[str, Array]
    twin: Mapping[str, Array]
    given: list[dict[str, Array]]
    """The inputs of both sides, keys and values included."""
    refusal: BundleError | None = None

    def difference(self, name: str, counterpart: str | None = None) -> Difference | None:
        """Of a value from its counterpart in PyTorch, by default the one of its name; None where there is none."""
        counterpart = counterpart or name
        if name not in self.bundle or counterpart not in self.twin:
            return None
        have, want = self.bundle[name], self.twin[counterpart]
        if name.startswith("present.") and ".encoder." not in name:
            return self._of_cache(want, have)
        return difference(want, have, self._considered(have.shape) if have.dtype.kind == "f" else None)

    def first_position(self, slot: int) -> int:
        """The position of a row's first new token: the tokens before it."""
        held = int((self.feed.inputs["attention_mask"][slot] != 0).sum())
        return held - int(self.feed.valid[slot].sum())

    def _of_cache(self, want: Array, have: Array) -> Difference | None:
        """Only of slots that hold tokens."""
        slots = min(want.shape[2], have.shape[2])
        mask = self.feed.inputs["attention_mask"][:, :slots] != 0
        held = np.zeros((len(mask), 1, slots), bool)
        held[:, 0, : mask.shape[1]] = mask
        return difference(want[:, :, :slots], have[:, :, :slots], np.broadcast_to(held, (*have.shape[:2], slots)))

    def _considered(self, shape: tuple[int, ...]) -> Array | None:
        """Which elements belong to tokens: numbers that are computed for padding mean nothing; masks are about it."""
        valid = self.feed.valid
        if valid.all():
            return None
        if shape[:2] == valid.shape:
            return valid
        if len(shape) == 2 and shape[0] == valid.size:  # tokens of all rows, one after another
            return valid.reshape(-1)
        if len(shape) == 4 and (shape[0], shape[2]) == valid.shape:
            return np.broadcast_to(valid[:, None], shape[:3])
        return None


class Crossed:
    """The cross cache of an encoder-decoder's rows, which a row's first run makes."""

    def __init__(self) -> None:
        self.held: Past = {}
        self.ready = np.zeros(0, bool)

    def keep(self, made: Mapping[str, Array], rows: slice, batch_size: int) -> None:
        """Of a run's outputs, where they are not empty."""
        for present, value in made.items():
            if present.startswith("present.") and ".encoder." in present and value.shape[2]:
                past = present.replace("present.", "past_key_values.")
                self.held.setdefault(past, np.zeros((batch_size, *value.shape[1:]), value.dtype))[rows] = value
                self.ready = self.ready if self.ready.size else np.zeros(batch_size, bool)
                self.ready[rows] = True


class Replay:
    """The runs of one cache."""

    def __init__(
        self,
        graph: ExposedGraph,
        twin: Twin,
        feeds: Sequence[Feed],
        batch_size: int,
        encoded: Mapping[str, tuple[Array, Array]] | None = None,
    ) -> None:
        """encoded: of an encoder-decoder the inputs about the source, each as the bundle and as PyTorch has it."""
        bundle = graph.bundle
        self.graph, self.twin, self.feeds = graph, twin, feeds
        self.compact, self.batch_size = bundle.target == "ort", batch_size
        part = "" if bundle.crossing is None else "decoder."
        caches = [] if graph.file == ENCODER else bundle.caches
        layers = len(caches)
        self.names = list(zip(contract.past_names(layers, part), contract.present_names(layers, part), strict=True))
        self.slots = max((f.inputs["attention_mask"].shape[1] for f in feeds), default=0) if self.compact else 0
        self.slots = max(self.slots, *bundle.windows, 0)  # fewer a layer with a window refuses
        sizes = [(batch_size, K, self.slots, D) for K, D in caches for _ in range(2)]
        self.dtypes = (np.dtype(bundle.cache_dtype), np.dtype(np.float32))
        self.empty = [
            {past: np.zeros(size, dtype) for (past, _), size in zip(self.names, sizes, strict=True)}
            for dtype in self.dtypes
        ]
        self.encoded = encoded or {}

    def runs(
        self, names: Iterable[str], provider: str = "cpu", threads: int = 0, optimize: bool = False
    ) -> Iterator[Run]:
        """Each run in order, with the values ``names`` of both sides. A run that onnxruntime refuses is the last, and
        has its error in place of the bundle's values."""
        names = list(names)
        runner = self.graph.runner(names, provider, threads, optimize)
        held = [{name: value.copy() for name, value in past.items()} for past in self.empty]
        crossed = [Crossed(), Crossed()]
        for index, feed in enumerate(self.feeds):
            rows = slice(feed.row, feed.row + len(feed.valid))
            given = [self._feed(side, feed, rows, held[side], crossed[side]) for side in (0, 1)]
            twin = self.twin.run(given[1], names)
            try:
                made = (runner(given[0]), twin)
            except BundleError as refusal:
                yield Run(index, feed, {}, twin, given, refusal)
                return
            yield Run(index, feed, *made, given)
            for side in (0, 1):
                self._keep(held[side], made[side], rows)
                crossed[side].keep(made[side], rows, self.batch_size)

    def once(
        self,
        run: Run,
        names: Iterable[str],
        provider: str = "cpu",
        threads: int = 0,
        optimize: bool = False,
        counterparts: Iterable[str] = (),
        nodes: int | None = None,
    ) -> Run:
        """A run again, with other values exposed. counterparts: further values of PyTorch's side. nodes: the bundle's
        side up to so many nodes only. Raises BundleError where onnxruntime fails."""
        names = list(names)
        made = {} if nodes == 0 else self.graph.runner(names, provider, threads, optimize, nodes)(run.given[0])
        return Run(run.index, run.feed, made, self.twin.run(run.given[1], [*names, *counterparts]), run.given)

    def _feed(self, side: int, feed: Feed, rows: slice, held: Past, crossed: Crossed) -> dict[str, Array]:
        given = {**feed.inputs, **{name: value[rows].copy() for name, value in held.items()}}
        crossing = self.graph.bundle.crossing
        if crossing is None or self.graph.file == ENCODER:
            return given
        given |= {name: pair[side][rows] for name, pair in self.encoded.items()}
        if crossed.ready[rows].size and crossed.ready[rows].all():
            given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :0]
            return given | {name: value[rows] for name, value in crossed.held.items()}
        B = len(feed.valid)
        names = contract.past_names(len(crossing.caches), "encoder.")
        sizes = [(B, K, 0, D) for K, D in crossing.caches for _ in range(2)]
        return given | {n: np.zeros(size, self.dtypes[side]) for n, size in zip(names, sizes, strict=True)}

    def _keep(self, held: Past, made: Mapping[str, Array], rows: slice) -> None:
        for past, present in self.names:
            if self.compact:
                held[past][rows] = made[present][:, :, : self.slots]
            else:
                held[past] = made[present]
