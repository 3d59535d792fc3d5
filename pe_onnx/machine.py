"""What a time depends on besides the code: the machine, and the versions of what runs on it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy")


def describe_machine() -> dict[str, Any]:
    """System, machine, cores, and the processor's name where the system says it."""
    processor = platform.processor()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor,
        "cores": os.cpu_count(),
    }


def processor_features() -> str:
    """Machine, processor, and the instructions it has where the system says so: what kernels are chosen by."""
    features = ""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        features = next(line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {platform.processor()} {features}"


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc keeps it for later)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def versions(packages: Iterable[str] = RUNTIME_PACKAGES) -> dict[str, str]:
    """Of pe-onnx, Python, and those of the packages that are installed."""
    from pe_onnx import __version__

    found = {"pe-onnx": __version__, "python": platform.python_version()}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def umask() -> int:
    """The bits that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
