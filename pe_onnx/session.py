"""A bundle open in onnxruntime: provider, threads and one way to run a step. Imports neither torch nor transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import PROMPT, RUNTIME, Bundle
from pe_onnx.errors import BundleError, ConfigError, ProviderError, did_you_mean, first_line, needs

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime loads
with needs("running a bundle", "'pe-onnx[cpu]', or 'pe-onnx[gpu]' for CUDA (never both)"):
    import onnxruntime

    from pe_onnx.prepared_graph import PreparedGraph, prepared_graph

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""onnxruntime's optimisations of a graph, each with those before it."""

RECORD_PLACEMENT = {"session.record_ep_graph_assignment_info": "1"}
"""Session options with which ``Session.placement`` can tell."""

DEFAULTS = {"session.intra_op.spin_duration_us": "1000"}
"""Session options where none are given. Threads wait for the next operator for 1 ms, and then sleep: longer than any
serial operator of a decode step takes, and than one thread waits for the other. With 100 us steps of SmolLM2-135M took
5 % longer on a quiet machine; onnxruntime's own 16 to 50 ms are no quicker and take the cores from all else, the next
run included where cores are shared (``benchmarks/session.py`` measures it)."""

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session option: where the weights of a graph lie that is given as bytes."""

PROMPT_TOKENS = 48
"""New tokens of a run from which on a quantized bundle's graph for prompts is quicker than its graph for steps."""
OPENING_TOKENS = 192
"""Those that are worth opening it, which takes some tenths of a second and the weights' memory once more."""

MAX_THREADS = 1024
"""More is a slip: each takes a stack, and onnxruntime starts them all."""


def resolve_provider(name: str) -> str:
    """``cpu``, ``cuda``, ``auto`` (CUDA where it can be had) or a provider's own name, to onnxruntime's name.

    Raises ConfigError for another name and ProviderError, which says what is missing, where the provider cannot be
    had: there is no silent fall-back.
    """
    name = {full: short for short, full in PROVIDERS.items()}.get(name, name)
    if name.endswith("ExecutionProvider"):
        if name not in (built := onnxruntime.get_available_providers()):
            hint = did_you_mean(name, built)
            raise ProviderError(f"provider {name!r} cannot be had{hint}: this onnxruntime has {', '.join(built)}")
        return name
    if name not in (*PROVIDERS, "auto"):
        hint = did_you_mean(name, [*PROVIDERS, "auto"])
        raise ConfigError(f"provider = {name!r} must be one of cpu, cuda, auto or onnxruntime's own names{hint}")
    missing = None if name == "cpu" else _missing_for_cuda()
    if name == "cuda" and missing:
        raise ProviderError(f"provider {name!r} cannot be had: {missing}")
    return PROVIDERS["cpu" if missing or name == "cpu" else "cuda"]


def _missing_for_cuda() -> str | None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} is a CPU build; pip uninstall onnxruntime, then "
            f"pip install 'pe-onnx[gpu]'"
        )
    if not os.path.exists("/proc/driver/nvidia/version") and not os.path.exists("/dev/nvidia0") and os.name == "posix":
        return "no NVIDIA driver is loaded on this machine"
    onnxruntime.preload_dlls()
    return None


class PlacedNode(NamedTuple):
    """A node of the graph as onnxruntime runs it, functions inlined, and the provider that runs it."""

    name: str
    operator: str
    """With its domain: ``ai.onnx::MatMul``."""
    provider: str
    """``cpu``, ``cuda`` or onnxruntime's own name."""


class Session:
    """An onnxruntime session of one of a bundle's graphs.

    provider: ``cpu``, ``cuda``, ``auto`` or onnxruntime's own name; the CPU runs what another has no kernel for.
    threads: of one operator, 0 for one a physical core. options: onnxruntime's session configuration, over DEFAULTS.
    optimize: False, or one of LEVELS; True is ``all``. graph: its file, by default the decoder. profile: where
    onnxruntime puts its profile, the beginning of a path; ``end_profile`` ends it. prepare: take the graph that an
    earlier start left optimised beside the bundle, or leave it for later ones (`prepared_graph`); on the CPU, without
    options of one's own, and where the bundle is large enough.
    Raises ProviderError where the provider cannot be had, ConfigError for threads or a level that are none, BundleError
    where onnxruntime refuses the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        threads: int = 0,
        options: Mapping[str, str] | None = None,
        optimize: bool | str = True,
        graph: str | None = None,
        profile: Path | None = None,
        prepare: bool = False,
    ) -> None:
        wanted = resolve_provider(provider)
        if not 0 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads = {threads} must be in 0..{MAX_THREADS}; 0 is one for each core")
        level = optimize if isinstance(optimize, str) else "all" if optimize else "off"
        if level not in LEVELS:
            raise ConfigError(f"optimize = {level!r} must be one of {', '.join(LEVELS)}{did_you_mean(level, LEVELS)}")
        self.bundle = bundle
        ours = graph is None and profile is None and wanted == PROVIDERS["cpu"]
        self.model = bundle.folder / (graph or bundle.model.name)
        if ours and (bundle.folder / RUNTIME).exists():
            self.model = bundle.folder / RUNTIME
        self.inputs, self.outputs = bundle.graphs.get(self.model.name, bundle.graphs[bundle.model.name])
        self.device = "cuda" if wanted == PROVIDERS["cuda"] else "cpu"
        self._prompts: Session | None = None
        given: dict[str, Any] = {"options": options, "optimize": optimize, "prepare": prepare}
        quick = graph is None and profile is None and (bundle.folder / PROMPT).exists()
        self._open_prompts = partial(Session, bundle, provider, threads, graph=PROMPT, **given) if quick else None
        plain = level == "all" and not options and profile is None and wanted == PROVIDERS["cpu"]
        place = prepared_graph(bundle, self.model.name) if prepare and plain else None
        providers = list(dict.fromkeys((wanted, PROVIDERS["cpu"])))
        try:
            self.inference: Any = place and _open_prepared(place, threads)
            if self.inference is None:
                session_options = _session_options(threads, level, options, profile)
                self.inference = onnxruntime.InferenceSession(str(self.model), session_options, providers=providers)
        except Exception as error:
            raise self._failed("load", error) from error
        if wanted not in self.inference.get_providers():
            raise ProviderError(f"provider {provider!r} cannot be had: onnxruntime did not start {wanted}")
        if self.inference.get_providers()[0] != wanted:
            raise ProviderError(f"onnxruntime fell back to {self.inference.get_providers()[0]} from {wanted}")
        self._check_contract()

    def for_tokens(self, tokens: int) -> Session:
        """The session that runs so many new tokens at once the quickest: itself, or that of a quantized bundle's graph
        for prompts, which is opened for the first long one and reads the same caches."""
        if self._open_prompts is not None and tokens >= (OPENING_TOKENS if self._prompts is None else PROMPT_TOKENS):
            self._prompts = self._prompts or self._open_prompts()
            return self._prompts
        return self

    def _check_contract(self) -> None:
        """Raises BundleError where the model's inputs and outputs are not what the manifest says."""
        dtype = {"float32": "float", "float16": "float16", "int8": "int8"}[self.bundle.cache_dtype]
        for values, wanted in (
            (self.inference.get_inputs(), self.inputs),
            (self.inference.get_outputs(), self.outputs),
        ):
            if [value.name for value in values] != list(wanted):
                raise BundleError(f"{self.model}: inputs or outputs are not those of its manifest")
            for value in values:
                other = contract.in_cache_dtype(value.name) and value.type != f"tensor({dtype})"
                if list(value.shape) != list(wanted[value.name]) or other:
                    raise BundleError(
                        f"{self.model}: {value.name} is {value.type} {value.shape}, its manifest says "
                        f"{list(wanted[value.name])}, {self.bundle.cache_dtype}"
                    )

    def placement(self) -> list[PlacedNode]:
        """Which provider runs each node, in a session that was opened with RECORD_PLACEMENT among its options."""
        short = {full: name for name, full in PROVIDERS.items()}
        return [
            PlacedNode(node.name, f"{node.domain or 'ai.onnx'}::{node.op_type}", short.get(part.ep_name, part.ep_name))
            for part in self.inference.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def array(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Zeros on the session's device, at an address that never changes."""
        return DeviceArray(shape, np.dtype(dtype), self.device)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """An uninitialised OrtValue on the session's device."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)

    def evaluate(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One run on arrays by input name, to all outputs in graph order. Raises BundleError where it fails."""
        try:
            return self.inference.run(None, dict(feeds))
        except Exception as error:
            raise self._failed("run", error) from error

    def end_profile(self) -> Path:
        """The file of onnxruntime's profile, a JSON list of events."""
        return Path(self.inference.end_profiling())

    def _failed(self, what: str, error: Exception) -> BundleError:
        return BundleError(f"onnxruntime cannot {what} {self.model}: {first_line(error)}")

    def binding(self) -> Any:
        """An empty onnxruntime IOBinding."""
        return self.inference.io_binding()

    def run(self, binding: Any) -> None:
        """One step with everything bound. Raises BundleError where onnxruntime fails."""
        try:
            self.inference.run_with_iobinding(binding)
        except Exception as error:
            raise self._failed("run", error) from error


def _session_options(
    threads: int, level: str = "all", options: Mapping[str, str] | None = None, profile: Path | None = None
) -> Any:
    result = onnxruntime.SessionOptions()
    result.log_severity_level = 4  # a refused run is an error of ours, in one line
    result.intra_op_num_threads = threads
    result.graph_optimization_level = LEVELS[level]
    for key, value in (DEFAULTS | dict(options or {})).items():
        result.add_session_config_entry(key, value)
    if profile is not None:
        result.enable_profiling = True
        result.profile_file_prefix = str(profile)
    return result


def _open_prepared(place: PreparedGraph, threads: int) -> Any:
    """A session of the graph that an earlier start left, or one that leaves it; None where neither can be had."""
    content = place.read()
    unfinished = place.scratch() if content is None else None
    try:
        if content:
            options = _session_options(threads, "off", {WEIGHTS_FOLDER: str(place.bundle.folder.resolve())})
            return onnxruntime.InferenceSession(content, options, providers=[PROVIDERS["cpu"]])
        if unfinished is not None:
            options = _session_options(threads)
            options.optimized_model_filepath = str(unfinished)
            model = str(place.bundle.folder / place.graph)
            opened = onnxruntime.InferenceSession(model, options, providers=[PROVIDERS["cpu"]])
            place.keep(unfinished)
            return opened
    except Exception:  # whatever onnxruntime has against it: the bundle's own file is what counts
        place.refuse(unfinished)
    return None


class DeviceArray:
    """A contiguous array that onnxruntime reads and writes in place; ``host`` is its memory on the CPU."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any], device: str) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.device = device
        self.host = np.zeros(self.shape, dtype)
        self._value = None
        if device != "cpu":
            self._value = onnxruntime.OrtValue.ortvalue_from_numpy(self.host, device, 0)
        self.address = self.host.ctypes.data if self._value is None else self._value.data_ptr()

    def upload(self) -> None:
        """Make the device see what was written to ``host``."""
        if self._value is not None:
            self._value.update_inplace(self.host)

    def download(self) -> np.ndarray[Any, Any]:
        """What the device wrote; on the CPU no copy."""
        if self._value is not None:
            self.host[...] = self._value.numpy()
        return self.host

    def bind(
        self,
        binding: Any,
        name: str,
        output: bool = False,
        shape: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        """Bind it, or a contiguous part of it of ``shape`` from element ``offset`` on."""
        bind = binding.bind_output if output else binding.bind_input
        bind(
            name,
            self.device,
            0,
            self.dtype.type,
            list(self.shape if shape is None else shape),
            self.address + offset * self.dtype.itemsize,
        )

    def bind_rows(self, binding: Any, name: str, row: int, rows: int, output: bool = False) -> None:
        """Bind the part ``[row : row + rows]`` of the first axis."""
        shape = self.shape[1:]
        self.bind(binding, name, output, (rows, *shape), row * math.prod(shape))
