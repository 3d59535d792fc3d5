"""A bundle's graph with values inside it as further outputs, in memory: the bundle stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pe_onnx.bundle import Bundle
from pe_onnx.errors import BundleError, first_line, needs
from pe_onnx.external_weights import readable
from pe_onnx.providers import PROVIDERS, onnxruntime, resolve_provider
from pe_onnx.tolerance import exact_options

with needs("looking into a graph", "'pe-onnx[export]'"):
    import onnx_ir as ir

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
Array = np.ndarray[Any, Any]


class ExposedGraph:
    """One of a bundle's graphs. Values inside model-local functions, branches and loops cannot be exposed."""

    def __init__(self, bundle: Bundle, file: str | None = None) -> None:
        """file: of the graph, by default the decoder's. Raises BundleError where it is no ONNX model."""
        self.bundle = bundle
        self.file = file or bundle.model.name
        self.path = bundle.folder / self.file
        try:
            self.model = ir.load(self.path)
        except Exception as error:
            raise BundleError(f"{self.path} cannot be read as an ONNX model: {first_line(error)}") from None
        self.nodes: list[ir.Node] = list(self.model.graph)
        """In topological order."""
        self.values = {value.name: value for node in self.nodes for value in node.outputs if value.name}
        self.outputs = [value.name or "" for value in self.model.graph.outputs]

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Names of the values that these are computed from, themselves included."""
        found: set[str] = set()
        queue = [self.values[name] for name in names if name in self.values]
        while queue:
            value = queue.pop()
            node = value.producer()
            if node is None or value.name in found:
                continue
            found.add(value.name or "")
            queue += [x for x in node.inputs if x is not None]
        return found

    def initializer(self, name: str) -> Array | None:
        """A weight or constant of the file, None for what is none."""
        value = self.model.graph.initializers.get(name)
        return None if value is None or value.const_value is None else readable(value.const_value).numpy()

    def runner(
        self,
        names: Iterable[str],
        provider: str = "cpu",
        threads: int = 0,
        optimize: bool = False,
        nodes: int | None = None,
    ) -> Runner:
        """The graph with the values ``names`` exposed, open in onnxruntime.

        optimize: with the graph optimisations that the exposed values leave room for. nodes: only the first so many,
        whose outputs are ``names`` alone.
        """
        proto = ir.to_proto(self.model)
        further = [name for name in names if name not in self.outputs or nodes is not None]
        if nodes is not None:
            del proto.graph.node[nodes:]
            del proto.graph.output[:]
        for name in further:
            proto.graph.output.add().name = name
        content = proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        for key, value in exact_options(self.bundle).items():
            options.add_session_config_entry(key, value)
        options.add_session_config_entry(EXTERNAL_FOLDER, str(self.bundle.folder.resolve()))
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = list(dict.fromkeys([resolve_provider(provider), PROVIDERS["cpu"]]))
        try:
            session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:
            raise BundleError(f"onnxruntime cannot load {self.path}: {first_line(error)}") from error
        return Runner(session, self.path)


class Runner:
    """Inputs by name to outputs by name."""

    def __init__(self, session: Any, path: Path) -> None:
        self.session = session
        self.path = path
        self.names = [value.name for value in session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Raises BundleError where onnxruntime fails."""
        try:
            return dict(zip(self.names, self.session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise BundleError(f"onnxruntime cannot run {self.path}: {first_line(error)}") from error
