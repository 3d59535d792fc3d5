"""The module that a bundle was traced from, run in PyTorch operation by operation, each value under its scoped name.

It is made anew from what the manifest names: our own decoder from its configuration and seed, a checkpoint through the
bridge, or the module that was exported. Weights are float32 whatever the bundle's dtype is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import CheckpointError, needs

with needs("the drill-down", "'pe-onnx[export]'"):
    import torch
    from torch.export.graph_signature import InputKind
    from torch.fx import Interpreter, Node

from pe_onnx.exporter import from_module, silenced
from pe_onnx.models.exportable import Exportable, from_config
from pe_onnx.models.parts import Part, parts
from pe_onnx.passes.scoped_names import scoped_names
from pe_onnx.tracing import to_program

Array = np.ndarray[Any, Any]


def rebuild(bundle: Bundle, reference: Any = None) -> Exportable:
    """What the bundle was exported from.

    reference: a checkpoint's path, or the module itself, ``module(input_ids, attention_mask, position_ids,
    past_key_values)``; default what the manifest names. Raises CheckpointError where it is not to be had.
    """
    source, last_only = bundle.manifest["source"], bundle.logits == "last"
    target = cast(contract.Target, bundle.target)
    if isinstance(reference, torch.nn.Module):
        if source["kind"] != "module":
            raise CheckpointError(f"reference = {type(reference).__name__}: the bundle is no module's; give none")
        K, D = bundle.caches[0]
        return from_module(reference, len(bundle.caches), K, D)[0]
    if reference is not None and not isinstance(reference, str | Path):
        raise CheckpointError(f"reference = {reference!r} must be a checkpoint's path, or the module that was exported")
    if reference is None and source["kind"] == "encoding":
        return from_config(DecoderConfig.from_dict(source["config"]), target, last_only)
    if reference is None and source["kind"] == "module":
        raise CheckpointError(f"the bundle was exported from a module, {source['class']}; hand it in as the reference")
    path = Path(reference or source["path"])
    if not path.exists():
        raise CheckpointError(f"the bundle's checkpoint {path} is gone; name it with --reference")
    with needs("a checkpoint", "'pe-onnx[export]'"):
        from pe_onnx.models import bridge, seq2seq
    if bundle.crossing is not None:
        return seq2seq.from_checkpoint(path, target, last_only, follow=True)
    return bridge.from_checkpoint(path, target, last_only, source.get("rope_scaling"), follow=True)


def plain(reference: Any, folder: str | Path) -> Any:
    """The reference that a parity check takes, of what ``rebuild`` takes: a module that follows the graph contract is
    run with a cache of its own, token by token."""
    if not isinstance(reference, torch.nn.Module) or "past_key_values" not in signature(reference.forward).parameters:
        return reference
    caches = read_bundle(folder, verify=False).caches

    @torch.no_grad()
    def compute(ids: Array) -> Array:
        past = [(torch.zeros(len(ids), K, 0, D),) * 2 for K, D in caches]
        made = []
        for end in range(1, ids.shape[1] + 1):
            mask = torch.ones(len(ids), end, dtype=torch.int64)
            positions = torch.full((len(ids), 1), end - 1)
            logits, past = reference(torch.from_numpy(ids[:, end - 1 : end].copy()), mask, positions, past)
            made.append(logits[:, -1:].float())
        return torch.cat(made, 1).numpy()

    return compute


class Twin:
    """One graph of a bundle in PyTorch."""

    def __init__(self, part: Part) -> None:
        with silenced():
            program = to_program(part)
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

    def _operation(self, name: str) -> Node:
        node = self.nodes[name]
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            return node.args[0]  # an output of several
        return node

    def tensors(self, name: str) -> list[str | None]:
        """Names in the ONNX file of the tensors that the operation behind a value was given, in order; None for one
        that was left out, and for what has no name there."""
        given = [x for x in self._operation(name).args if x is None or isinstance(x, Node)]
        return [None if x is None else self._name_of.get(x.name) for x in given]

    def numbers(self, name: str) -> dict[str, int | float]:
        """The numbers that it was given, by the names of its arguments, defaults included."""
        node = self._operation(name)
        schema = getattr(node.target, "_schema", None)
        if schema is None:
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


def twins(bundle: Bundle, reference: Any = None) -> dict[str, Twin]:
    """A twin of each of the bundle's graphs, by file name."""
    with silenced():
        exportable = rebuild(bundle, reference)
    return {part.file: Twin(part) for part in parts(exportable, torch.float32, bundle.logits)}
