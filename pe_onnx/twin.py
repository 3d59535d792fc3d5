"""The module that a bundle was traced from, run in PyTorch operation by operation, each value under its scoped name.

It is made anew from what the manifest names: our own decoder from its configuration and seed, a checkpoint through the
bridge, or the module that was exported. Weights are float32 whatever the bundle's dtype is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import Bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import CheckpointError, needs

with needs("the drill-down", "'pe-onnx[export]'"):
    import torch
    from torch.export.graph_signature import InputKind
    from torch.fx import Interpreter, Node

from pe_onnx import reference as references
from pe_onnx.exporter import from_module, silenced
from pe_onnx.models.exportable import Exportable, from_config
from pe_onnx.models.parts import Part, parts
from pe_onnx.passes.fused_projections import parts_of
from pe_onnx.passes.scoped_names import scoped_names
from pe_onnx.rounded_module import holder
from pe_onnx.tracing import to_program

Array = np.ndarray[Any, Any]


def rebuild(bundle: Bundle, reference: Any = None) -> Exportable:
    """What the bundle was exported from.

    reference: a checkpoint's path; of a bundle made from a module that module, ``module(input_ids, attention_mask,
    position_ids, past_key_values)``. Any other is one side of a parity check alone, and what the manifest names is
    made. Raises CheckpointError where it is not to be had.
    """
    source, last_only = bundle.manifest["source"], bundle.logits == "last"
    target = cast(contract.Target, bundle.target)
    if source["kind"] == "module":
        if not references.follows_contract(reference):
            raise CheckpointError(
                f"the bundle was exported from a module, {source['class']}; hand it in as the reference, as it was "
                f"exported, with past_key_values"
            )
        K, D = bundle.caches[0]
        if bundle.quantization is not None:
            reference = copy.deepcopy(reference)  # whose weights are to be rounded
        return from_module(reference, len(bundle.caches), K, D)[0]
    if not isinstance(reference, str | Path):
        reference = None
    if reference is None and source["kind"] == "encoding":
        return from_config(DecoderConfig.from_dict(source["config"]), target, last_only)
    path = Path(reference or source["path"])
    if not path.exists():
        raise CheckpointError(f"the bundle's checkpoint {path} is gone; name it with --reference")
    with needs("a checkpoint", "'pe-onnx[export]'"):
        from pe_onnx.models import bridge, seq2seq
    if bundle.crossing is not None:
        return seq2seq.from_checkpoint(path, target, last_only, follow=True)
    return bridge.from_checkpoint(path, target, last_only, source.get("rope_scaling"), follow=True)


class Twin:
    """One graph of a bundle in PyTorch."""

    def __init__(self, part: Part, limit: int | None) -> None:
        """limit: tokens the encoding can take."""
        with silenced():
            program = to_program(part, limit)
        self.inputs = list(part.inputs)
        self.outputs = list(part.outputs)
        self.module = program.graph_module
        own = scoped_names(program.graph)
        given = program.graph_signature
        made = [spec.arg.name for spec in given.output_specs]
        self.names = {**own, **dict(zip(made, self.outputs, strict=True))}
        """Of each operation of the program, the value's name in the ONNX file."""
        self.nodes: dict[str, Node] = {self.names[n.name]: n for n in program.graph.nodes if n.name in self.names}
        self.weights: dict[str, torch.Tensor] = {}
        """Parameters, buffers and constants by their names in the ONNX file."""
        self._bound: list[str | None] = []
        self._parameter_of: dict[str, str] = {}
        for spec in given.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                self._bound.append(None)
                continue
            name = spec.target or ""
            held = program.state_dict.get(name, program.constants.get(name))
            if not isinstance(held, torch.Tensor):
                raise CheckpointError(f"{name} is no tensor: the module cannot be run operation by operation")
            self.weights[name] = held.detach()
            self._bound.append(name)
            self._parameter_of[spec.arg.name] = name
        inputs = (spec.arg.name for spec in given.input_specs if spec.kind is InputKind.USER_INPUT)
        self._name_of = {**self.names, **self._parameter_of, **dict(zip(inputs, self.inputs, strict=True))}

    def weight(self, name: str) -> torch.Tensor | None:
        """A parameter, buffer or constant, or several that the file has joined, one behind the other."""
        held = [self.weights.get(part) for part in parts_of(name)]
        found = [tensor for tensor in held if tensor is not None]
        if len(found) < len(held):
            return None
        if len(found) == 1:
            return found[0]
        rows = {tensor.shape[1] for tensor in found}
        return torch.cat(found, 0 if len(rows) == 1 else 1)

    def _operation(self, name: str) -> Node | None:
        node = self.nodes.get(name)
        if node is None:
            return None
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            return node.args[0]  # an output of several
        return node

    def tensors(self, name: str) -> list[str | None]:
        """Names in the ONNX file of the tensors that the operation behind a value was given, in order; None for one
        that was left out, and for what has no name there. Of a value that PyTorch has not, none."""
        node = self._operation(name)
        given = [x for x in node.args if x is None or isinstance(x, Node)] if node is not None else []
        return [None if x is None else self._name_of.get(x.name) for x in given]

    def numbers(self, name: str) -> dict[str, int | float]:
        """The numbers that it was given, by the names of its arguments, defaults included."""
        node = self._operation(name)
        schema = getattr(node.target, "_schema", None) if node is not None else None
        if node is None or schema is None:
            return {}
        found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        found |= dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        return {key: x for key, x in found.items() if isinstance(x, int | float)}

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Array], wanted: Iterable[str]) -> dict[str, Array]:
        """Inputs by name to the values ``wanted`` and all outputs."""
        names = {*wanted, *self.outputs}
        values = iter(feeds[name] for name in self.inputs)
        args = [torch.from_numpy(next(values)) if name is None else self.weights[name] for name in self._bound]
        recorder = _Recorder(self.module, {k: v for k, v in self.names.items() if v in names})
        recorder.run(*args)
        return recorder.found


class _Recorder(Interpreter):
    def __init__(self, module: torch.fx.GraphModule, names: Mapping[str, str]) -> None:
        super().__init__(module)
        self.wanted = names
        self.found: dict[str, Array] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            if isinstance(value, torch.Tensor):
                self.found[self.wanted[n.name]] = value.detach().cpu().numpy().copy()
            elif isinstance(value, int | float | bool):
                self.found[self.wanted[n.name]] = np.asarray(value)
        return value


def of_graph(bundle: Bundle, file: str, reference: Any = None) -> Twin:
    """The twin of one of the bundle's graphs; reference as of ``rebuild``."""
    with silenced():
        exportable = rebuild(bundle, reference)
    holder(bundle)(exportable.module)
    part = next(part for part in parts(exportable, torch.float32, bundle.logits) if part.file == file)
    return Twin(part, exportable.max_length)
