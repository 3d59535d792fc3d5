"""Where onnxruntime runs a graph: names of providers, what each is given, and why one cannot be had."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from pe_onnx import cuda_memory
from pe_onnx.errors import ConfigError, ProviderError, did_you_mean, needs

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime loads
with needs("running a bundle", "'pe-onnx[cpu]', or 'pe-onnx[gpu]' for CUDA (never both)"):
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SHORT = {full: short for short, full in PROVIDERS.items()}

CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}
"""Of the CUDA provider beside the device's number. Memory grows by what is asked for, not to the next power of two,
which beside a cache of many gigabytes would be the device's end. Products of float32 are products of float32: TF32
rounds their factors to 10 bits, a thousand times what parity allows."""

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")
"""One of them is there where Linux has an NVIDIA driver; the last in WSL."""


class Device(NamedTuple):
    """A kind of memory and its number, as onnxruntime names them."""

    kind: str
    """``cpu`` or ``cuda``."""
    number: int = 0


def split_number(name: str) -> tuple[str, int]:
    """``cuda:1`` to its provider and number, any other name to itself and 0. Raises ConfigError for what is no
    number."""
    kind, colon, number = name.partition(":")
    if not colon:
        return name, 0
    if kind != "cuda" or not number.isascii() or not number.isdigit() or len(number) > 3:
        raise ConfigError(f"provider = {name!r} must be one of cpu, cuda, cuda:N, auto or onnxruntime's own names")
    return kind, int(number)


def resolve_provider(name: str) -> str:
    """``cpu``, ``cuda``, ``cuda:N``, ``auto`` (CUDA where it can be had) or a provider's own name, to onnxruntime's
    name.

    Raises ConfigError for another name and ProviderError, which says what is missing, where the provider cannot be
    had: there is no silent fall-back.
    """
    name, _ = split_number(name)
    name = SHORT.get(name, name)
    if name.endswith("ExecutionProvider"):
        if name not in (built := onnxruntime.get_available_providers()):
            hint = did_you_mean(name, built)
            raise ProviderError(f"provider {name!r} cannot be had{hint}: this onnxruntime has {', '.join(built)}")
        return name
    if name not in (*PROVIDERS, "auto"):
        hint = did_you_mean(name, [*PROVIDERS, "auto"])
        raise ConfigError(f"provider = {name!r} must be one of cpu, cuda, auto or onnxruntime's own names{hint}")
    missing = None if name == "cpu" else missing_for_cuda()
    if name == "cuda" and missing:
        raise ProviderError(f"provider {name!r} cannot be had: {missing}")
    return PROVIDERS["cpu" if missing or name == "cpu" else "cuda"]


def device_of(name: str) -> Device:
    """Where a session of this provider has its memory. Raises what ``resolve_provider`` raises."""
    return Device("cuda", split_number(name)[1]) if resolve_provider(name) == PROVIDERS["cuda"] else Device("cpu")


def provider_list(name: str, capture: bool = False) -> list[Any]:
    """What a session is opened with: the provider and its options, then the CPU for what it has no kernel for.

    capture: let CUDA record decode steps as graphs. Raises what ``resolve_provider`` raises.
    """
    wanted = resolve_provider(name)
    if wanted == PROVIDERS["cpu"]:
        return [wanted]
    if wanted != PROVIDERS["cuda"]:
        return [wanted, PROVIDERS["cpu"]]
    onnxruntime.set_default_logger_severity(3)  # what CUDA's part warns of at each start is no concern of a user
    number = device_of(name).number
    given = {"device_id": str(number), "user_compute_stream": str(cuda_memory.stream(number))}
    return [(wanted, {**given, **CUDA_OPTIONS, "enable_cuda_graph": str(int(capture))}), PROVIDERS["cpu"]]


def missing_for_cuda() -> str | None:
    """What is in the way of CUDA, one line; None where nothing is. Its libraries are loaded then."""
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} is a CPU build; pip uninstall onnxruntime, then "
            f"pip install 'pe-onnx[gpu]'"
        )
    if os.name == "posix" and not any(map(os.path.exists, DRIVER_FILES)):
        return "no NVIDIA driver is loaded on this machine"
    said = preloaded()
    return f"its libraries cannot be loaded: {said}; pip install 'onnxruntime-gpu[cuda,cudnn]'" if said else None


@functools.cache
def preloaded() -> str | None:
    """Load CUDA's and cuDNN's libraries, once; None, or what is missing in one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # where onnxruntime complains
        onnxruntime.preload_dlls()
    failed = [line.split(":")[0].rpartition(" ")[2] for line in said.getvalue().splitlines() if "Failed" in line]
    return ", ".join(dict.fromkeys(Path(name).name for name in failed)) or None
