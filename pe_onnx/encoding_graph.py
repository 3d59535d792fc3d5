"""The part of a decoder's graph that is its positional encoding, as an ONNX file of its own.

Nothing is computed anew: what is cut out are the values that the decoder itself reads, and all they are made of.

- a rotation: the cosines and sines that turn queries, and those that turn keys;
- a bias: what attention adds to its scores, ``[B, H, T, S]``;
- an embedding: the vectors that are added to those of the tokens, ``[B, T, C]``.

The outputs are named in the picture that ``write_encoding_graph`` returns; the inputs are those of the decoder that
they depend on. Layers that read the same values share an entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_onnx.angles import KEEPING, cut, rotations
from pe_onnx.bundle import Bundle
from pe_onnx.errors import needs

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTIONS = {"CachedAttention": 7, "MaskedAttention": 5}
"""Our attention operators, to the input that holds a bias."""
TEXT = ("input_ids", "past_key_values")
"""How the inputs begin whose values are the text's."""
MOST_BYTES = 32 << 20
"""Of the file: a table of positions that is larger is not loaded a second time for a picture."""


def write_encoding_graph(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Write the file and say what it holds: ``{"kind": "rotation", "inputs": [...], "curves": [...]}``.

    kind: ``rotation``, ``bias``, ``embedding``; ``none`` for the encoding of that name, and ``unknown``, with a
    ``reason``, for what is none of them: then nothing is written. Of a rotation a curve names ``query`` and ``key``,
    each the outputs with cosines and sines, and ``head_size``; of the others ``value``. ``layers`` are those it is of.
    """
    with needs("the picture of an encoding", "'pe-onnx[export]'"):
        import onnx_ir as ir

        from pe_onnx import external_weights

    if bundle.manifest["encoding"]["name"] == "none":
        return {"kind": "none"}
    model = external_weights.load(bundle.model)
    kinds = {"rotation": _rotation, "bias": _bias, "embedding": _embedding}
    kind, found = next(
        ((kind, got) for kind, find in kinds.items() if (got := list(find(model.graph, bundle)))), ("", [])
    )
    if not found:
        return {"kind": "unknown", "reason": "its graph spells the encoding out in a way that is not recognised"}
    exposed = list(dict.fromkeys(value for _, roles in found for values in roles.values() for value in values))
    names = {value: f"exposed_{i}" for i, value in enumerate(exposed)}
    inputs = cut(model, exposed)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > MOST_BYTES:
        return {"kind": "unknown", "reason": f"its table of positions takes {size >> 20} MiB, too much for a picture"}
    ir.save(model, path)
    curves = []
    for about, roles in found:
        outputs = {role: [names[value] for value in values] for role, values in roles.items()}
        curves.append({**about, **{role: o if role != "value" else o[0] for role, o in outputs.items()}})
    return {"kind": kind, "inputs": inputs, "curves": curves}


def _rotation(graph: ir.Graph, bundle: Bundle) -> Iterator[tuple[dict[str, Any], dict[str, list[ir.Value]]]]:
    """One for each set of tables; where queries and keys have their own (xPos), told apart by who reads them."""
    by_layers: dict[tuple[int, ...], list[Any]] = {}
    for rotation in rotations(graph):
        by_layers.setdefault(tuple(rotation.layers), []).append(rotation)
    for layers, group in by_layers.items():
        if not layers or len(group) > 2:
            continue
        sides = {side: r for r in group for side in (_sides(r.cos) if len(group) == 2 else ("query", "key"))}
        if sides.keys() == {"query", "key"}:
            about = {"layers": list(layers), "head_size": bundle.caches[layers[0]][1]}
            yield about, {side: [sides[side].cos, sides[side].sin] for side in ("query", "key")}


def _sides(cos: ir.Value) -> set[str]:
    """Whether queries or keys are turned by these cosines."""
    found = set()
    for turning, _ in cos.uses():
        waiting = list(turning.outputs)
        while waiting:
            for node, index in waiting.pop().uses():
                if node.op_type in ATTENTIONS and index < 2:
                    found.add(("query", "key")[index])
                elif node.op_type in KEEPING:
                    waiting += node.outputs
    return found


def _bias(graph: ir.Graph, bundle: Bundle) -> Iterator[tuple[dict[str, Any], dict[str, list[ir.Value]]]]:
    by_value: dict[ir.Value, list[int]] = {}
    for node in graph:
        at = ATTENTIONS.get(node.op_type)
        value = node.inputs[at] if at is not None and len(node.inputs) > at else None
        if value is not None and value.dtype is not None and value.dtype.is_floating_point():
            written = [v.name for v in node.outputs if v.name and v.name.startswith("present.")]
            by_value.setdefault(value, []).append(int(written[0].split(".")[1]) if written else 0)
    text = _of_text(graph)
    for value, layers in by_value.items():
        if value not in text:
            yield {"layers": layers}, {"value": [value]}


def _embedding(graph: ir.Graph, bundle: Bundle) -> Iterator[tuple[dict[str, Any], dict[str, list[ir.Value]]]]:
    """The first sum of tokens' vectors, which no attention has seen, and of what is not the text's, but no constant."""
    text, varying = _of_text(graph), _behind(graph, graph.inputs, through_shape=True)
    attended = _behind(graph, [v for v in graph.inputs if (v.name or "").startswith(TEXT[1])], through_shape=False)
    for node in graph:
        pair = [value for value in node.inputs if value is not None]
        if node.op_type != "Add" or len(pair) != 2 or len({value in text for value in pair}) != 2:
            continue
        moving, still = pair if pair[0] in text else pair[::-1]
        floating = still.dtype is not None and still.dtype.is_floating_point()
        if floating and still in varying and moving not in attended:
            yield {"layers": []}, {"value": [still]}
            return


def _of_text(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on the text, and not on its length alone."""
    return _behind(graph, [value for value in graph.inputs if (value.name or "").startswith(TEXT)], through_shape=False)


def _behind(graph: ir.Graph, values: Sequence[ir.Value], through_shape: bool) -> set[ir.Value]:
    found = set(values)
    for node in graph:
        if (through_shape or node.op_type not in ("Shape", "Size")) and not found.isdisjoint(node.inputs):
            found.update(node.outputs)
    return found
