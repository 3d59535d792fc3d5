"""How exact a bundle's rotations are: the angle at a position against position times frequency, in ulps.

RoPE turns by ``angle[p, i] = p * f[i]``. At a long position the angle is thousands of radians, and one that was made in
float16 is off by a large part of a turn where short texts show nothing. So the part of the graph that makes cosines and
sines is cut out and run at chosen positions, and ``atan2(sin, cos)`` compared with ``p * f`` in float64, a whole number
of turns aside. A factor on both (YaRN's, xPos') cancels.

Cosines and sines are taken where a rotation reads them, the inputs of ``RotaryEmbedding``; where the rotation is
spelled out in single operators, at the nodes Cos and Sin, or behind the Cast that follows them. The frequency is what
the graph itself multiplies the position with, in its own precision: its angle at position 1, in the same run, since
frequencies may depend on how far a run reaches. Whether that is the right one is a matter of parity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import BundleError, InputError, first_line, needs
from pe_onnx.providers import onnxruntime

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

LONG = (32767, 131071)
"""Positions at the ends of common lengths, where float32 angles of thousands of radians have few digits left."""
ULP = "1 ulp is the spacing of float32 at the angle"
KEEPING = (
    "Cast",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Concat",
    "Slice",
    "Split",
    "Expand",
    "Transpose",
    "Identity",
    "Neg",
)
"""Operators behind which a cosine is still one, in another place or precision."""
LEARNING = tuple(2**k for k in range(7))
"""Positions from which the frequencies of a table without Cos and Sin are read."""


class AngleError(NamedTuple):
    """The worst channel of one table at one position."""

    position: int
    max_ulps: float
    """In units of float32's spacing at the angle, before whole turns are taken off."""
    max_abs_radians: float
    channel: int
    """The pair of channels that is worst, in ulps."""
    table: str
    """The name of the cosines in the graph."""
    layers: list[int]
    """Those whose queries or keys it turns."""
    reach: int | None
    """Tokens that the run reached, where the frequencies depend on it; None where they do not."""


class Rotation(NamedTuple):
    """Cosines and sines in a graph, and the angle they are of."""

    cos: ir.Value
    sin: ir.Value
    angle: ir.Value | None
    """What the node Cos reads; None where there is none, but a table."""
    layers: list[int]


def rotary_angles(folder: str | Path, positions: Sequence[int] | None = None) -> list[AngleError]:
    """The angle errors of a bundle's decoder at each position, for each pair of tables; empty where nothing rotates.

    positions: by default 1, 127, the last trained one, one beyond it, 32767 and 131071, of these what the encoding
    takes. Raises InputError for positions that it does not, BundleError where the graph cannot be run.
    """
    bundle = read_bundle(folder, verify=False)
    wanted = default_positions(bundle) if positions is None else list(positions)
    limit = bundle.max_length
    for position in wanted:
        if position < 0 or (limit is not None and position >= limit):
            raise InputError(f"position {position} must be in 0..{limit - 1 if limit else 'any'}")
    tables = Tables(bundle)
    return [error for position in wanted for error in tables.errors(position)] if tables.rotations else []


def default_positions(bundle: Bundle) -> list[int]:
    """Ascending, without those beyond what the encoding takes."""
    trained = bundle.trained_length or 2048
    wanted = {1, 127, trained - 1, trained + trained // 2, *LONG}
    return sorted(p for p in wanted if p >= 1 and (bundle.max_length is None or p < bundle.max_length))


def summary(errors: Sequence[AngleError]) -> str:
    """One line: the worst of all tables at each position. Empty for no errors."""
    if not errors:
        return ""
    worst: dict[int, AngleError] = {}
    for error in errors:
        if error.position not in worst or error.max_ulps > worst[error.position].max_ulps:
            worst[error.position] = error
    first, *others = (f"{_shown(error.max_ulps)} ulp at {position:,}" for position, error in sorted(worst.items()))
    radians = max(error.max_abs_radians for error in errors)
    return f"angles: {', '.join([first, *others])}; at most {radians:.1e} radians; {ULP}"


class Tables:
    """The part of a bundle's graph that makes cosines and sines, in onnxruntime."""

    def __init__(self, bundle: Bundle) -> None:
        with needs("the angles of a rotation", "'pe-onnx[export]'"):
            import onnx_ir as ir

            from pe_onnx import external_weights

        self.bundle = bundle
        model = external_weights.load(bundle.model)
        self.rotations = list(rotations(model.graph))
        if not self.rotations:
            return
        self.exposed = list(dict.fromkeys(v for r in self.rotations for v in (r.cos, r.sin, r.angle) if v is not None))
        self.inputs = cut(model, self.exposed)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        except Exception as error:
            raise BundleError(f"onnxruntime cannot load the rotation of {bundle.model}: {first_line(error)}") from error

    def errors(self, position: int) -> Iterator[AngleError]:
        """Of each pair of tables."""
        by_name = self._run(position)
        for rotation in self.rotations:
            cos, sin = (by_name[str(value.name)] for value in (rotation.cos, rotation.sin))
            have = np.arctan2(sin, cos)  # [2, R/2]: at position 1 and at the one asked for
            if rotation.angle is None:
                frequency = self._learned(rotation)
            else:
                frequency = _nearest(np.abs(have[0]), np.abs(by_name[str(rotation.angle.name)][0]))
            frequency = np.copysign(frequency, have[0])  # some models turn the other way
            exact = position * frequency
            radians = np.abs(np.remainder(have[1] - exact + np.pi, 2 * np.pi) - np.pi)
            spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
            ulps = np.where(radians > 0, radians / spacing, 0)
            channel = int(ulps.argmax())
            reach = position + 1 if self.bundle.path_dependent else None
            yield AngleError(
                position,
                float(ulps[channel]),
                float(radians.max()),
                channel,
                str(rotation.cos.name),
                rotation.layers,
                reach,
            )

    def _learned(self, rotation: Rotation) -> Array:
        """The frequencies of a table, from ever longer positions: each tells a digit more of them."""
        frequency = np.zeros(())
        limit = self.bundle.max_length or LEARNING[-1] + 1
        for position in (p for p in LEARNING if p < limit):
            by_name = self._run(position)
            angle = np.arctan2(by_name[str(rotation.sin.name)][1], by_name[str(rotation.cos.name)][1])
            turns = np.round((position * frequency - angle) / (2 * np.pi))
            frequency = (angle + 2 * np.pi * turns) / position
        return np.abs(frequency)

    def _run(self, position: int) -> dict[str, Array]:
        """Every exposed value at position 1 and at ``position``, float64 ``[2, channels]``."""
        together = [1, position]
        if "position_ids" in self.inputs:
            rows = self._feed(together, position)
            return {name: x[np.array([0, -1])] for name, x in rows.items()}
        runs = [self._feed([p], p) for p in together]  # the graph counts positions from what is cached
        return {name: np.stack([run[name][-1] for run in runs]) for name in runs[0]}

    def _feed(self, positions: list[int], last: int) -> dict[str, Array]:
        """Tokens at some positions, of a row that reaches as far as ``last``. Float64 ``[tokens, channels]``."""
        T = len(positions)
        sizes = {
            "batch_size": 1,
            "sequence_length": T,
            "total_sequence_length": max(last + 1, T),
            "past_sequence_length": max(last + 1 - T, 0),
        }
        shapes, _ = self.bundle.graphs[self.bundle.model.name]
        feeds = {}
        for name in self.inputs:
            shape = [sizes.get(n, 1) if isinstance(n, str) else n for n in shapes[name]]
            dtype = np.dtype(np.int64) if len(shapes[name]) == 2 else contract.storage_dtype(self.bundle.cache_dtype)
            feeds[name] = np.ones(shape, dtype) if name == "attention_mask" else np.zeros(shape, dtype)
        if "position_ids" in feeds:
            feeds["position_ids"][0] = positions
        try:
            values = self.session.run(None, feeds)
        except Exception as error:
            reason = first_line(error)
            raise BundleError(f"onnxruntime cannot run the rotation of {self.bundle.model}: {reason}") from error
        names = [output.name for output in self.session.get_outputs()]
        rows = {name: _rows(value.astype(np.float64), T) for name, value in zip(names, values, strict=True)}
        return {str(value.name): rows[f"exposed_{i}"] for i, value in enumerate(self.exposed)}


def _rows(value: Array, tokens: int) -> Array:
    """``[tokens, channels]`` of a table with any axes of size 1."""
    return value.reshape(-1, value.shape[-1])[-tokens:]


def _nearest(angles: Array, frequencies: Array) -> Array:
    """For each channel the frequency of the graph that it is turned by: a table may hold each twice, or only some."""
    return frequencies[np.abs(angles[:, None] - frequencies).argmin(1)]


def _shown(ulps: float) -> str:
    return f"{ulps:.2g}" if ulps < 10 else f"{ulps:,.0f}"


def cut(model: ir.Model, exposed: Sequence[ir.Value]) -> list[str]:
    """Leave of a model what makes some values, its outputs; the names of the inputs that takes."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    graph = model.graph
    graph.outputs.clear()
    for i, value in enumerate(exposed):
        copy = ir.node("Identity", [value])
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = f"exposed_{i}", value.type, value.shape
        graph.append(copy)
        graph.outputs.append(copy.outputs[0])
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return [str(value.name) for value in graph.inputs]


def rotations(graph: ir.Graph) -> Iterator[Rotation]:
    """Every pair of tables that turns queries or keys."""
    readers: dict[tuple[ir.Value | None, ...], list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "RotaryEmbedding" and node.domain in ("", "pe_onnx"):
            readers.setdefault(tuple(node.inputs[1:4]), []).append(node)
    if readers:
        for inputs, nodes in readers.items():
            cos, sin = _at_positions(graph, *inputs)
            yield Rotation(cos, sin, _angle(cos), sorted({i for node in nodes for i in _layers(node)}))
        return
    sines = {id(node.inputs[0]): node for node in graph if node.op_type == "Sin"}
    for node in graph:
        sine = sines.get(id(node.inputs[0])) if node.op_type == "Cos" else None
        if sine is not None and _multiplies(node.outputs[0]):
            layers = sorted({i for reader in _readers(node.outputs[0]) for i in _layers(reader)})
            yield Rotation(_cast(node.outputs[0]), _cast(sine.outputs[0]), node.inputs[0], layers)


def _at_positions(
    graph: ir.Graph, cos: ir.Value | None, sin: ir.Value | None, positions: ir.Value | None = None
) -> list[ir.Value]:
    """The cosines and sines of each token; the operator may be given positions, and tables of every position."""
    import onnx_ir as ir

    tables = [value for value in (cos, sin) if value is not None]
    if positions is None:
        return tables
    found = []
    for table in tables:
        gather = ir.node("Gather", [table, positions])
        gather.outputs[0].name, gather.outputs[0].type = f"{table.name} at {positions.name}", table.type
        graph.append(gather)
        found.append(gather.outputs[0])
    return found


def _angle(cos: ir.Value) -> ir.Value | None:
    """What is read by the Cos that a value comes from, however it was scaled, cast or cut since."""
    waiting, seen = [cos], set()
    while waiting:
        node = waiting.pop(0).producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type == "Cos":
            return node.inputs[0]
        waiting += [value for value in node.inputs if value is not None]
    return None


def _cast(value: ir.Value) -> ir.Value:
    """Behind the Cast that alone reads a value, where one does."""
    readers = _readers(value)
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Cast" else value


def _readers(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in value.uses()]


def _multiplies(value: ir.Value) -> bool:
    """Whether a value is multiplied with what is no constant: a rotation does that, a sum of encodings does not."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        for node in _readers(current):
            others = [v for v in node.inputs if v is not None and v is not current]
            if node.op_type == "Mul" and not (others and _is_constant(others[0])):
                return True
            if node.op_type in (*KEEPING, "Mul"):
                waiting += node.outputs
    return False


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.const_value is not None or (node is not None and node.op_type == "Constant")


def _layers(node: ir.Node) -> set[int]:
    """The layers whose cache is written by the attention that reads what a node makes."""
    waiting, seen, found = [node], {id(node)}, set()
    while waiting:
        current = waiting.pop()
        written = {int(v.name.split(".")[1]) for v in current.outputs if v.name and v.name.startswith("present.")}
        found |= written
        if not written:
            waiting += [n for value in current.outputs for n in _readers(value) if id(n) not in seen]
            seen |= {id(n) for n in waiting}
    return found
