"""A bundle open in onnxruntime: provider, threads and one way to run a step. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import PROMPT, Bundle
from pe_onnx.device_arrays import DeviceArray, to_device, to_host
from pe_onnx.errors import BundleError, ConfigError, ProviderError, did_you_mean, first_line
from pe_onnx.position_channels import MOST_POSITIONS
from pe_onnx.prepared_graph import PreparedGraph, prepared_graph
from pe_onnx.providers import PROVIDERS, SHORT, device_of, onnxruntime, provider_list, resolve_provider

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

UNCAPTURED = -1
"""onnxruntime's number of no CUDA graph."""

PROMPT_TOKENS = 48
"""New tokens of a run from which on a quantized bundle's graph for prompts is quicker than its graph for steps."""
OPENING_TOKENS = 192
"""Those that are worth opening it, which takes some tenths of a second and the weights' memory once more."""

MAX_THREADS = 1024
"""More is a slip: each takes a stack, and onnxruntime starts them all."""


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
        if wanted == PROVIDERS["cpu"] and bundle.manifest["dtype"] == "bf16":
            raise ProviderError(
                f"onnxruntime has no kernels for bfloat16 on the CPU: run bundle {bundle.folder} with --provider cuda"
            )
        if not 0 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads = {threads} must be in 0..{MAX_THREADS}; 0 is one for each core")
        level = optimize if isinstance(optimize, str) else "all" if optimize else "off"
        if level not in LEVELS:
            raise ConfigError(f"optimize = {level!r} must be one of {', '.join(LEVELS)}{did_you_mean(level, LEVELS)}")
        self.bundle = bundle
        self.device = device_of(provider)
        plain = graph is None and profile is None
        ours = bundle.graph_on(SHORT.get(wanted, wanted)) if plain else bundle.model.name
        self.model = bundle.folder / (graph or ours)
        self.inputs, self.outputs = bundle.tensors(self.model.name)
        self.caches = bundle.caches_of(self.model.name)
        """K and D of each layer's cache, as the graph has them."""
        self.position_bits = bundle.positions_of(self.model.name)
        """Where keys hold positions too, the bits of a digit (`position_channels`)."""
        self.score_heads = bundle.score_heads if self.position_bits is None else 0
        """H of the tensors [H, T, S] that a run holds; 0 where attention is fused and has no bias."""
        limits = [bundle.max_length, None if self.position_bits is None else MOST_POSITIONS]
        self.max_length = min((n for n in limits if n is not None), default=None)
        """Tokens that the encoding, and the channels that hold positions, can take at all."""
        self._prompts: Session | None = None
        given: dict[str, Any] = {"options": options, "optimize": optimize, "prepare": prepare}
        on_cpu = wanted == PROVIDERS["cpu"]
        quick = plain and self.device.kind != "cuda" and (bundle.folder / PROMPT).exists()
        self._open_prompts = partial(Session, bundle, provider, threads, graph=PROMPT, **given) if quick else None
        common = level == "all" and not options and profile is None and on_cpu
        place = prepared_graph(bundle, self.model.name) if prepare and common else None
        self.not_captured: str | None = None if self.device.kind == "cuda" else "the provider is not CUDA"
        """Why decode steps are not recorded as CUDA graphs; None where they are."""
        if self.device.kind == "cuda":
            options = {**RECORD_PLACEMENT, **dict(options or {})}
            if bundle.target != "ort" or graph is not None or profile is not None:
                self.not_captured = "the cache grows" if bundle.target != "ort" else "a single graph was asked for"
        session_options = _session_options(threads, level, options, profile)
        try:
            self.inference: Any = place and _open_prepared(place, threads)
            if self.inference is None and self.not_captured is None:
                self.inference = self._open_capturing(provider, session_options)
            if self.inference is None:
                providers = provider_list(provider)
                self.inference = onnxruntime.InferenceSession(str(self.model), session_options, providers=providers)
        except Exception as error:
            raise self._failed("load", error) from error
        self._graphs: dict[int, Any] = {}
        if wanted not in self.inference.get_providers():
            raise ProviderError(f"provider {provider!r} cannot be had: onnxruntime did not start {wanted}")
        if self.inference.get_providers()[0] != wanted:
            raise ProviderError(f"onnxruntime fell back to {self.inference.get_providers()[0]} from {wanted}")
        if self.device.kind == "cuda":
            self._check_attention()
        self._check_contract()

    def _open_capturing(self, provider: str, options: Any) -> Any:
        """A session whose steps can be recorded as CUDA graphs; None, with the reason noted, where onnxruntime refuses
        that."""
        try:
            return onnxruntime.InferenceSession(str(self.model), options, providers=provider_list(provider, True))
        except Exception as error:
            if "graph capture" not in str(error):
                raise
            self.not_captured = "the graph has nodes that CUDA hands to the CPU and back"
            return None

    def _check_attention(self) -> None:
        """Raises ProviderError where attention would run on the CPU, the whole cache copied there and back each
        step."""
        if any(node.provider == "cpu" and node.operator.endswith("::GroupQueryAttention") for node in self.placement()):
            raise ProviderError(
                f"bundle {self.bundle.folder}: onnxruntime has no GroupQueryAttention in {self.bundle.cache_dtype} for "
                f"CUDA; export it with --dtype fp16 or bf16, or with --target portable"
            )

    def for_tokens(self, tokens: int) -> Session:
        """The session that runs so many new tokens at once the quickest: itself, or that of a quantized bundle's graph
        for prompts, which is opened for the first long one and reads the same caches."""
        if self._open_prompts is not None and tokens >= (OPENING_TOKENS if self._prompts is None else PROMPT_TOKENS):
            self._prompts = self._prompts or self._open_prompts()
            return self._prompts
        return self

    def _check_contract(self) -> None:
        """Raises BundleError where the model's inputs and outputs are not what the manifest says."""
        dtype = {"float32": "float"}.get(self.bundle.cache_dtype, self.bundle.cache_dtype)
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

    @property
    def cache_bytes_per_token(self) -> int:
        return self.bundle.bytes_per_token(self.caches)

    def placement(self) -> list[PlacedNode]:
        """Which provider runs each node, in a session that was opened with RECORD_PLACEMENT among its options."""
        return [
            PlacedNode(node.name, f"{node.domain or 'ai.onnx'}::{node.op_type}", SHORT.get(part.ep_name, part.ep_name))
            for part in self.inference.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def array(self, shape: Sequence[int], dtype: str, pinned: bool = False) -> DeviceArray:
        """Zeros on the session's device, at an address that never changes."""
        return DeviceArray(shape, dtype, self.device, pinned)

    def value(self, values: np.ndarray[Any, Any], dtype: str) -> Any:
        """An OrtValue on the session's device with a copy of ``values``, stored as ``contract.storage_dtype`` says."""
        return to_device(values, dtype, self.device)

    def host(self, value: Any, dtype: str) -> np.ndarray[Any, Any]:
        """What an OrtValue of the session's device holds; on the CPU a view."""
        return to_host(value, dtype, self.device)

    def evaluate(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One run on arrays by input name, to all outputs in graph order. Raises BundleError where it fails."""
        try:
            return self.inference.run(None, dict(feeds), self._uncaptured())
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

    def run(self, binding: Any, recorded: int | None = None) -> None:
        """One step with everything bound. Raises BundleError where onnxruntime fails.

        recorded: the number of a CUDA graph (``new_graph``), which is made at the first run, of what is bound then,
        and launched at later ones; it is not waited for, as ``DeviceArray.download`` does that.
        """
        options = self._uncaptured() if recorded is None else self._graphs[recorded]
        try:
            self.inference.run_with_iobinding(binding, options)
        except Exception as error:
            raise self._failed("run", error) from error

    def new_graph(self) -> int:
        """The number of a CUDA graph that is still to be recorded: of one binding of addresses and shapes."""
        number = len(self._graphs) + 1  # 0 is onnxruntime's own where none is given
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._graphs[number] = options
        return number

    def _uncaptured(self) -> Any:
        """Options of a run that is not recorded."""
        if self.not_captured is not None:
            return None
        if UNCAPTURED not in self._graphs:
            self._graphs[UNCAPTURED] = onnxruntime.RunOptions()
            self._graphs[UNCAPTURED].add_run_config_entry("gpu_graph_id", str(UNCAPTURED))
        return self._graphs[UNCAPTURED]


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
