"""Names that say which module a value belongs to: ``decoder.blocks.3.attention/rotary_embedding``.

They make the file readable in a viewer and a profile, and they are how ``pe-onnx bisect`` finds a value's counterpart
in PyTorch: a value has the same name in every export of the same module, whatever stands before it.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
from torch.fx import Graph, Node

ROOT = "step"
"""The scope of what stands in no module of the model: lengths, masks and positions of a step."""


def scoped_names(graph: Graph) -> dict[str, str]:
    """Of each operation of a traced program: its name to ``module/operator``, numbered within the module from the
    second on. The further outputs of an operator are ``module/operator.1`` and so on."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and getattr(node.args[0], "name", None) in names:
            index = node.args[1]
            names[node.name] = names[node.args[0].name] + (f".{index}" if index else "")
            continue
        stem = f"{_scope(node)}/{_operator(node)}"
        names[node.name] = f"{stem}_{seen[stem]}" if seen[stem] else stem
        seen[stem] += 1
    return names


def scope_of(name: str) -> str:
    """The module of a scoped name, empty where it has none."""
    return name.rpartition("/")[0]


def _scope(node: Node) -> str:
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return next((path for path in reversed(stack) if path and not path.startswith("_empty_nn_module")), ROOT)


def _operator(node: Node) -> str:
    """``rotary_embedding`` of ``pe_onnx.rotary_embedding.default``."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return re.sub(r"\W", "_", name.rpartition("::")[2]).strip("_")


class ScopedNames(ir.passes.InPlacePass):
    """Give every value that an operation of the program computes its scoped name, and its node too.

    names: from ``scoped_names``, by the names that the exporter gave the values. Nodes that an operation was translated
    to beside its last are named after it and their type: ``module/silu:Sigmoid``.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        fixed = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
        beside: Counter[str] = Counter()
        for node in model.graph:
            found = [(value, name) for value in node.outputs if (name := self.names.get(value.name or "")) is not None]
            for value, name in found:
                if id(value) not in fixed:
                    value.name = name
                    modified = True
            operation = _translated(node)
            if found:
                node.name = found[0][1]
            elif operation in self.names:
                stem = f"{self.names[operation]}:{node.op_type}"
                node.name = f"{stem}_{beside[stem]}" if beside[stem] else stem
                beside[stem] += 1
        return ir.passes.PassResult(model, modified)


def _translated(node: ir.Node) -> str:
    """The name of the operation that a node was translated from."""
    return node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0].removeprefix("%")
