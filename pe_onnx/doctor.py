"""What is installed, which providers work, and what CUDA lacks: looked at, not guessed, and on any machine."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx.errors import PeOnnxError, first_line
from pe_onnx.machine import describe_machine, versions
from pe_onnx.providers import PROVIDERS, missing_for_cuda, onnxruntime, preloaded, provider_list
from pe_onnx.yardstick_model import product_chain, weight_names

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
EXPORT = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "safetensors", "gguf")
RUNNING = ("numpy", "tokenizers", "jinja2")

DRIVER = Path("/proc/driver/nvidia/version")
LIBRARIES = {"driver": ("libcuda.so.1",), "cuBLAS": ("libcublas.so.13", "libcublas.so.12"), "cuDNN": ("libcudnn.so.9",)}
"""By what they are for; the first that loads is taken."""

WIDTH = 16


class Provider(NamedTuple):
    """A provider that has been tried."""

    name: str
    """``cpu`` or ``cuda``."""
    works: bool
    """Whether a small product ran on it and came out right."""
    problem: str | None
    """What is missing, one line."""


def examine() -> dict[str, Any]:
    """Everything that ``pe-onnx doctor`` shows, plain values for JSON.

    ``providers`` are tried by running a product on each; ``other_providers`` onnxruntime was built with too.
    ``problems`` are those that keep something from working, each with its remedy; a machine without a GPU is none.
    """
    installed = versions((*RUNTIMES, *RUNNING, *EXPORT))
    problems = []
    if all(name in installed for name in RUNTIMES):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, then "
            "pip install 'pe-onnx[gpu]' or 'pe-onnx[cpu]'"
        )
    others = [name for name in onnxruntime.get_available_providers() if name not in PROVIDERS.values()]
    return {
        "versions": {**installed, "onnxruntime (loaded)": onnxruntime.__version__},
        "missing_for_export": [name for name in EXPORT if name not in installed],
        "machine": describe_machine(),
        "providers": [try_provider(name)._asdict() for name in PROVIDERS],
        "other_providers": others,
        "cuda": cuda(),
        "problems": problems,
    }


def try_provider(name: str) -> Provider:
    """Run a product of two small matrices on a provider; where the CPU had to help out, that counts as not working."""
    try:
        if problem := name == "cuda" and missing_for_cuda():
            return Provider(name, False, problem)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        weight = onnxruntime.OrtValue.ortvalue_from_numpy(np.full((WIDTH, WIDTH), 0.5, np.float32))
        options.add_external_initializers(weight_names(1), [weight])
        session = onnxruntime.InferenceSession(product_chain(1, WIDTH), options, providers=provider_list(name))
        wanted = PROVIDERS[name]
        if session.get_providers()[0] != wanted:
            return Provider(name, False, f"onnxruntime did not start {wanted}")
        (result,) = session.run(None, {"x": np.ones((1, WIDTH), np.float32)})
        if not np.allclose(result, WIDTH / 2):
            return Provider(name, False, f"1 x 0.5, {WIDTH} times, came out as {float(result[0, 0]):g}")
    except PeOnnxError as error:
        return Provider(name, False, str(error))
    except Exception as error:  # whatever onnxruntime has against it
        return Provider(name, False, first_line(error))
    return Provider(name, True, None)


def cuda() -> dict[str, Any]:
    """Of CUDA's parts which are there: driver, libraries, devices with their memory, whatever onnxruntime is."""
    found: dict[str, Any] = {"driver_version": None, "libraries": {}, "devices": []}
    with suppress(OSError, IndexError, ValueError):
        words = DRIVER.read_text().splitlines()[0].split()
        found["driver_version"] = next(word for word in words if word[0].isdigit() and "." in word)
    if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        with suppress(Exception):
            preloaded()
    for purpose, names in LIBRARIES.items():
        found["libraries"][purpose] = next((name for name in names if _loads(name)), None)
    if found["libraries"]["driver"]:
        found["devices"] = _devices()
    with suppress(importlib.metadata.PackageNotFoundError):
        found["wheel"] = importlib.metadata.version("onnxruntime-gpu")
    return found


def _loads(library: str) -> bool:
    if platform.system() != "Linux":
        return False
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _devices() -> list[dict[str, Any]]:
    """Names and total memory in bytes, by the driver; empty where it does not answer."""
    driver = ctypes.CDLL(LIBRARIES["driver"][0])
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    devices = []
    for number in range(count.value):
        handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(96), ctypes.c_size_t()
        failed = (
            driver.cuDeviceGet(ctypes.byref(handle), number)
            or driver.cuDeviceGetName(name, len(name), handle)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
        )
        if not failed:
            devices.append({"number": number, "name": name.value.decode(), "memory_bytes": memory.value})
    return devices
