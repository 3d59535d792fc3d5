"""What an encoding adds to a decoder, counted: nodes of the exported graph, parameters, and what a step makes of it.

The graph is that of a tiny decoder, exported with the encoding and once more with none; what the second lacks is the
encoding's. Figures are of the encoding's own code, at whatever sizes it was built for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pe_onnx.errors import needs
from pe_onnx.graph_nodes import GraphNodes, Node, read_graph

with needs("the cost of an encoding", "'pe-onnx[export]'"):
    import torch

    from pe_onnx.encoding import PositionalEncoding
    from pe_onnx.exporter import export

DEPTHS = (512, 1024, 3072)
"""Tokens in the cache."""


@dataclass(frozen=True)
class AddedNodes:
    """Of an ``ort`` graph beside that of ``none``."""

    added: list[Node]
    """In the graph's order."""
    removed: list[Node]
    """Nodes of ``none`` that the encoding's graph does without."""
    functions: list[str]
    """Model-local functions that ``none`` has not."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an operator with its domain, as ``pe_onnx::AlibiBias``."""
        shown = {
            kind: [{"name": node.name, "operator": operator(node), "inputs": node.inputs} for node in nodes]
            for kind, nodes in (("added", self.added), ("removed", self.removed))
        }
        return {**shown, "functions": self.functions}


@dataclass(frozen=True)
class Cost:
    """Of the encoding alone."""

    parameters: int
    """Numbers that are trained."""
    step_bytes: dict[int, int]
    """By tokens in the cache, the new one among them: bytes that a decode step of one row makes in float32 for all
    layers: the added vector, the cosines and sines, or the bias. Nothing of it is kept in the cache."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "step_bytes": {str(depth): n for depth, n in self.step_bytes.items()}}


def operator(node: Node) -> str:
    return f"{node.domain}::{node.operator}" if node.domain else node.operator


def added_nodes(
    name: str, parameters: Mapping[str, Any], progress: Callable[[str], None] = lambda stage: None
) -> AddedNodes:
    """Raises ConfigError for parameters that the encoding does not take at the tiny decoder's sizes."""
    with tempfile.TemporaryDirectory() as folder:

        def graph(encoding: str, values: Mapping[str, Any]) -> GraphNodes:
            progress(encoding)
            output = Path(folder, encoding)
            bundle = export(
                encoding=encoding, encoding_parameters=values, preset="tiny", output=output, verify=False, force=True
            )
            return read_graph(bundle.model)

        return difference(graph(name, parameters), graph("none", {}))


def difference(graph: GraphNodes, plain: GraphNodes) -> AddedNodes:
    """What the first has beyond the second; nodes are the same where module and operator are, in their order."""
    added: list[Node] = []
    removed: list[Node] = []
    before, after = ([_kind(node) for node in g.nodes] for g in (plain, graph))
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for tag, begin, end, first, last in matcher.get_opcodes():
        if tag != "equal":
            removed += plain.nodes[begin:end]
            added += graph.nodes[first:last]
    return AddedNodes(added, removed, sorted(graph.functions.keys() - plain.functions.keys()))


def _kind(node: Node) -> tuple[str, str]:
    return node.name.rpartition("/")[0], operator(node)


def cost(encoding: PositionalEncoding) -> Cost:
    """Of a built encoding. Depths beyond its length are left out."""
    parameters = sum(parameter.numel() for parameter in encoding.parameters())
    limit = encoding.max_length
    depths = [depth for depth in DEPTHS if limit is None or depth <= limit]
    with torch.no_grad():
        made = {depth: sum(_bytes(tensor) for tensor in _step(encoding, depth)) for depth in depths}
    return Cost(parameters, made)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _step(encoding: PositionalEncoding, depth: int) -> list[torch.Tensor]:
    """What our decoder makes once a step, for each encoding that its layers have."""
    position = torch.tensor([[depth - 1]])
    layers = dict.fromkeys(encoding.layer(i) for i in range(encoding.config.num_hidden_layers))
    made: list[torch.Tensor] = []
    for one in layers:
        if one.hook == "embed":
            made.append(one.embed(position))
        elif one.hook == "rotate":
            made += one.tables(position)
        elif one.hook == "bias":
            made.append(one.bias(position, None, depth))
    return made
