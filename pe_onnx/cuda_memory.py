"""What our caches need of CUDA beside onnxruntime: a stream, pinned memory, and copies of parts of arrays.

The CUDA runtime is the one that onnxruntime-gpu itself has loaded; its few functions are called by ctypes. Sizes and
pitches are in bytes.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from pe_onnx.errors import ProviderError

VERSIONS = (13, 12)
"""Of CUDA, the newest first: those that onnxruntime-gpu has been built for."""

NON_BLOCKING = 1
TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3

Array = np.ndarray[Any, Any]


@functools.cache
def _runtime() -> Any:
    for version in VERSIONS:
        try:
            return ctypes.CDLL(f"libcudart.so.{version}")
        except OSError:
            continue
    raise ProviderError(f"the CUDA runtime, libcudart.so.{VERSIONS[0]}, cannot be loaded; pip install 'pe-onnx[gpu]'")


def _call(function: str, *arguments: Any) -> None:
    runtime = _runtime()
    if code := getattr(runtime, function)(*arguments):
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        raise ProviderError(f"CUDA: {function}: {runtime.cudaGetErrorString(code).decode()}")


@functools.cache
def stream(device: int) -> int:
    """The stream on which sessions of a device run and all copies are made, so that each waits for what is before it;
    one for each device, for the life of the process."""
    made = ctypes.c_void_p()
    _call("cudaSetDevice", device)
    _call("cudaStreamCreateWithFlags", ctypes.byref(made), NON_BLOCKING)
    assert made.value is not None
    return made.value


def synchronize(device: int) -> None:
    """Wait for all that was asked of a device's stream."""
    _call("cudaStreamSynchronize", ctypes.c_void_p(stream(device)))


class _Pinned:
    """Page-locked host memory, given back with the last array that views it."""

    def __init__(self, size: int) -> None:
        self.address = ctypes.c_void_p()
        _call("cudaHostAlloc", ctypes.byref(self.address), ctypes.c_size_t(size), 0)
        assert self.address.value is not None
        interface: dict[str, Any] = {"shape": (size,), "typestr": "|u1", "data": (self.address.value, False)}
        self.__array_interface__ = {**interface, "version": 3}

    def __del__(self) -> None:
        _runtime().cudaFreeHost(self.address)


def pinned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that are copied to and from a device without a copy in between."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    flat = np.asarray(_Pinned(max(size, 1)))[:size]
    flat[:] = 0
    result: Array = flat.view(dtype).reshape(shape)
    return result


def clear(address: int, size: int, device: int) -> None:
    """Zeros."""
    _call(
        "cudaMemsetAsync",
        ctypes.c_void_p(address),
        0,
        ctypes.c_size_t(size),
        ctypes.c_void_p(stream(device)),
    )


def copy(to: int, source: int, size: int, kind: int, device: int) -> None:
    """Ask for a copy of ``size`` bytes; it happens after what was asked before."""
    _call(
        "cudaMemcpyAsync",
        ctypes.c_void_p(to),
        ctypes.c_void_p(source),
        ctypes.c_size_t(size),
        kind,
        ctypes.c_void_p(stream(device)),
    )


def copy_strided(
    to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, device: int
) -> None:
    """Likewise of ``height`` pieces of ``width`` bytes, which begin every ``pitch`` bytes."""
    if width and height:
        _call(
            "cudaMemcpy2DAsync",
            ctypes.c_void_p(to),
            ctypes.c_size_t(to_pitch),
            ctypes.c_void_p(source),
            ctypes.c_size_t(source_pitch),
            ctypes.c_size_t(width),
            ctypes.c_size_t(height),
            kind,
            ctypes.c_void_p(stream(device)),
        )
