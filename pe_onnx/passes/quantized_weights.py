"""Weights in blocks of few bits: products become MatMulNBits, the token embedding GatherBlockQuantized.

Both are onnxruntime's (domain com.microsoft) and read the same bytes: a head that is tied to the embedding stands in
the file once. Only weights of products with activations and the table that ``input_ids`` look up are rounded; norms,
biases, tables of positions, frequencies and relative biases keep their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from pe_onnx.block_quantization import Blocks, quantize_blocks
from pe_onnx.errors import ConfigError, did_you_mean
from pe_onnx.passes.fused_projections import parts_of
from pe_onnx.passes.nodes import attribute, drop, made_by, readers, sizes, take_place

MICROSOFT = "com.microsoft"
HALF = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded."""

    bits: int
    block: int
    symmetric: bool
    accuracy_level: int
    """Of MatMulNBits: 4 rounds activations to int8 in blocks, 1 keeps them in float32."""


class PartTensor(ir.LazyTensor):
    """A tensor made while it is written. ``storage``: equal for tensors of the same bytes."""

    def __init__(self, make: Callable[[], Any], dtype: Any, shape: tuple[int, ...], name: str, storage: object) -> None:
        super().__init__(lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
        self.storage = storage


@dataclass
class Rounded:
    """One matrix ``[N, K]``, rounded at the first of its parts that is written and let go with the last."""

    name: str
    matrix: Callable[[], Any]
    N: int
    K: int
    dtype: ir.DataType
    rounding: Rounding
    _blocks: Blocks | None = None
    _left: set[str] = field(default_factory=set)

    def part(self, kind: str, shape: tuple[int, ...] | None = None) -> PartTensor:
        """kind: ``packed``, ``scales`` or ``zero_points``. shape: another one for the same bytes."""
        bits, block = self.rounding.bits, self.rounding.block
        count = self.K // block
        shapes = {
            "packed": (self.N, count, block * bits // 8),
            "scales": (self.N, count),
            "zero_points": (self.N, -(-count * bits // 8)),
        }
        dtype = self.dtype if kind == "scales" else ir.DataType.UINT8
        wanted = shape or shapes[kind]
        return PartTensor(lambda: self._made(kind).reshape(wanted), dtype, wanted, self._named(kind), (id(self), kind))

    def _named(self, kind: str) -> str:
        return f"{self.name}_Q{self.rounding.bits}" if kind == "packed" else f"{self.name}_{kind}"

    def _made(self, kind: str) -> Any:
        if self._blocks is None:
            r = self.rounding
            self._blocks = quantize_blocks(self.matrix(), r.bits, r.block, r.symmetric, self.dtype.numpy())
            self._left = {"packed", "scales"} | (set() if r.symmetric else {"zero_points"})
        made = getattr(self._blocks, kind)
        self._left.discard(kind)
        if not self._left:
            self._blocks = None
        return made


class QuantizedWeights(ir.passes.InPlacePass):
    """Of one or several graphs over the same weights, each rounded once.

    exclude: patterns of weights that keep their precision. ``rounded`` holds what was rounded, by name, ``kept`` the
    other matrices of products. Raises ConfigError where a block does not divide a row, and, from ``finish``, for a
    pattern that no weight has.
    """

    def __init__(
        self,
        rounding: Rounding,
        exclude: tuple[str, ...] = (),
        smaller: tuple[int, ...] = (),
        head: tuple[int, int] | None = None,
    ) -> None:
        """smaller: blocks for rows that the wanted one does not divide. head: the vocabulary's size, and the bits of
        matrices with as many rows: the token embedding and the head."""
        super().__init__()
        self.rounding, self.exclude, self.smaller, self.head = rounding, exclude, smaller, head
        self.rounded: dict[str, Rounded] = {}
        self.kept: set[str] = set()
        self._by_storage: dict[object, Rounded] = {}
        self._astray: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.graph is None or node.domain:
                continue
            if node.op_type in ("MatMul", "Gemm"):
                modified |= self._product(model.graph, node)
            elif node.op_type == "Gather":
                modified |= self._lookup(model.graph, node)
        if modified:
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)

    def finish(self) -> None:
        """Raises ConfigError for what cannot be done as it was asked for."""
        names = sorted(self.rounded.keys() | self.kept)
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"exclude = {pattern!r} matches no weight{did_you_mean(pattern, names)}")
        if self._astray:
            block, more = self.rounding.block, len(self._astray) - 1
            raise ConfigError(
                f"block = {block} does not divide the rows of {self._astray[0]}{f' and {more} more' if more else ''}: "
                f"give a smaller --block, or --exclude them"
            )
        if not self.rounded:
            raise ConfigError("no weight is left to be rounded")

    def _matrix(self, weight: ir.Value | None, turned: bool) -> Rounded | None:
        """The weight in blocks; turned: it is stored ``[K, N]``. None for what keeps its precision."""
        tensor = weight.const_value if weight is not None and weight.is_initializer() else None
        if weight is None or tensor is None or tensor.dtype not in HALF or len(tensor.shape) != 2:
            return None
        name, (rows, columns) = weight.name or "", tensor.shape.numpy()
        N, K = (columns, rows) if turned else (rows, columns)
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            self.kept.add(name)
            return None
        block = next((block for block in (self.rounding.block, *self.smaller) if K % block == 0), None)
        if block is None:
            self._astray.append(f"{name} ({K})")
            return None
        key = (storage_of(tensor), turned)
        if key not in self._by_storage:
            bits = self.head[1] if self.head is not None and self.head[0] == N else self.rounding.bits
            rounding = replace(self.rounding, block=block, bits=bits)
            made = Rounded(name, _reader(tensor, turned), N, K, tensor.dtype, rounding)
            self._by_storage[key] = self.rounded[name] = made
        return self._by_storage[key]

    def _product(self, graph: ir.Graph, node: ir.Node) -> bool:
        gemm = node.op_type == "Gemm"
        x, weight = node.inputs[:2]
        bias = node.inputs[2] if gemm and len(node.inputs) > 2 else None
        plain = [node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)] == [1.0, 1.0]
        if gemm and (not plain or attribute(node, "transA", 0)):
            return False
        if bias is not None and len(sizes(bias) or (0, 0)) != 1:
            return False
        made = self._matrix(weight, turned=not (gemm and attribute(node, "transB", 0)))
        if made is None or x is None:
            return False
        old = node.outputs[0]
        if gemm:
            x, old = _unflattened(x, old)
        r = made.rounding
        attributes = {"K": made.K, "N": made.N, "bits": r.bits, "block_size": r.block}
        if r.accuracy_level:
            attributes["accuracy_level"] = r.accuracy_level
        zero_points = None if r.symmetric else self._initializer(graph, made, "zero_points")
        inputs = [x, *(self._initializer(graph, made, kind) for kind in ("packed", "scales")), zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
        _put(graph, node, old, product)
        return True

    def _lookup(self, graph: ir.Graph, node: ir.Node) -> bool:
        table, ids = node.inputs[:2]
        if ids is None or not ids.is_graph_input() or ids.name != "input_ids" or attribute(node, "axis", 0):
            return False
        made = self._matrix(table, turned=False)
        if made is None:
            return False
        r = made.rounding
        inputs = [
            self._initializer(graph, made, "packed", (made.N, made.K * r.bits // 8)),
            ids,
            self._initializer(graph, made, "scales"),
        ]
        if not r.symmetric:
            inputs.append(self._initializer(graph, made, "zero_points"))
        attributes = {"bits": r.bits, "block_size": r.block, "gather_axis": 0, "quantize_axis": 1}
        _put(graph, node, node.outputs[0], ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT))
        return True

    def _initializer(self, graph: ir.Graph, made: Rounded, kind: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        tensor = made.part(kind, shape)
        name = f"{tensor.name}_rows" if shape else str(tensor.name)
        if name not in graph.initializers:
            tensor.name = name
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            graph.initializers[name] = value
        return graph.initializers[name]


def rounded_weights(model: ir.Model) -> Mapping[str, Callable[[], Any]]:
    """Of a model that went through the pass: by the name a weight had, a function to its values ``[N, K]`` float32."""
    from pe_onnx.block_quantization import dequantize_blocks

    found: dict[str, Callable[[], Any]] = {}
    for node in model.graph:
        if node.domain != MICROSOFT or node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        product = node.op_type == "MatMulNBits"
        values = node.inputs[1:4] if product else [node.inputs[0], *node.inputs[2:4]]
        bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 32)
        suffix = f"_Q{bits}" if product else f"_Q{bits}_rows"
        tensors = [value.const_value if value is not None else None for value in values]
        tensors += [None] * (3 - len(tensors))

        def make(tensors: list[Any] = tensors, bits: int = bits, block: int = block) -> Any:
            packed, scales, zeros = (None if tensor is None else tensor.numpy() for tensor in tensors)
            assert packed is not None
            assert scales is not None
            return dequantize_blocks(Blocks(packed.reshape(*scales.shape, block * bits // 8), scales, zeros), bits)

        assert values[0] is not None
        found.setdefault((values[0].name or "").removesuffix(suffix), make)
    return found


def rounded_parts(model: ir.Model) -> Mapping[str, Callable[[], Any]]:
    """The same with each of the weights that were joined by itself, under its own name."""
    found: dict[str, Callable[[], Any]] = {}
    for name, make in rounded_weights(model).items():
        parts = parts_of(name)
        if len(parts) == 1:
            found[name] = make
            continue
        ends = np.cumsum([0, *model.graph.initializers[f"{name}/widths"].const_value.numpy()])  # type: ignore[union-attr]
        for part, begin, end in zip(parts, ends, ends[1:], strict=False):
            found[part] = partial(_rows, make, begin, end)
    return found


def _rows(make: Callable[[], Any], begin: int, end: int) -> Any:
    return make()[begin:end]


def storage_of(tensor: Any) -> object:
    """Equal for tensors of the same bytes, without reading them."""
    if isinstance(tensor, PartTensor):
        return tensor.storage
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.location, tensor.offset
    raw: Any = None if isinstance(tensor, ir.LazyTensor) else getattr(tensor, "raw", None)
    return raw.data_ptr() if hasattr(raw, "data_ptr") else id(tensor)


def _reader(tensor: Any, turned: bool) -> Callable[[], Any]:
    def read() -> Any:
        values = tensor.numpy()
        if isinstance(tensor, ir.ExternalTensor):  # or all files stay mapped that have been read
            values = values.copy()
            tensor.release()
        return np.ascontiguousarray(values.T) if turned else values

    return read


def _unflattened(x: ir.Value, product: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What goes into the Reshape before a Gemm and what comes out of that behind it: MatMulNBits takes any rank."""
    before = made_by(x, "Reshape")
    after = readers(product)
    if before is None or len(after) != 1 or (after[0].domain, after[0].op_type) != ("", "Reshape"):
        return x, product
    source, result = before.inputs[0], after[0].outputs[0]
    if source is None or len(sizes(source) or ()) != len(sizes(result) or (0, 0)):
        return x, product
    return source, result


def _put(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Node) -> None:
    """``new`` before ``node``; its output takes the name and readers of ``old``, and what nobody reads is dropped."""
    graph.insert_before(node, new)
    take_place(new.outputs[0], old)
    drop(old)
