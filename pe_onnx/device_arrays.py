"""Arrays that onnxruntime reads and writes in place, on the CPU or on a CUDA device.

On a device an array has no copy on the host but what is asked for: ``host`` is made when it is first looked at, for
what goes back and forth at each step, tokens and logits. Keys and values stay where they are; parts of them are copied
from place to place on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pe_onnx import cuda_memory
from pe_onnx.contract import storage_dtype
from pe_onnx.providers import Device, onnxruntime

BFLOAT16 = 16
"""ONNX's number of the element type, which numpy does not have."""

Array = np.ndarray[Any, Any]


def element_type(dtype: str) -> Any:
    """What onnxruntime calls a dtype of ours: numpy's type, or ONNX's number where numpy has none."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def allocate(shape: Sequence[int], dtype: str, device: Device) -> Any:
    """An OrtValue whose content is not set."""
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type(dtype), *device)


def to_device(values: Array, dtype: str, device: Device) -> Any:
    """An OrtValue with a copy of ``values``, which are stored as ``contract.storage_dtype`` says."""
    made = allocate(values.shape, dtype, device)
    if device.kind == "cpu":
        made.update_inplace(np.ascontiguousarray(values))
    elif values.size:
        values = np.ascontiguousarray(values)
        cuda_memory.copy(made.data_ptr(), values.ctypes.data, values.nbytes, cuda_memory.TO_DEVICE, device.number)
        cuda_memory.synchronize(device.number)  # ``values`` may go
    return made


def to_host(value: Any, dtype: str, device: Device) -> Array:
    """What an OrtValue holds; on the CPU a view."""
    result: Array
    if device.kind == "cpu":
        result = value.numpy()
        return result
    result = np.empty(value.shape(), storage_dtype(dtype))
    if result.size:
        cuda_memory.copy(result.ctypes.data, value.data_ptr(), result.nbytes, cuda_memory.TO_HOST, device.number)
        cuda_memory.synchronize(device.number)
    return result


class DeviceArray:
    """Zeros of a shape, contiguous, at an address that never changes.

    dtype: numpy's name, or ``bfloat16``, whose numbers stand as their 16 bits in arrays of the host. pinned: what goes
    back and forth to a device does so without a copy in between, and ``upload`` does not wait.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: Device, pinned: bool = False) -> None:
        self.shape = tuple(shape)
        self.name = dtype
        self.dtype = storage_dtype(dtype)
        self.device = device
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._element = element_type(dtype)
        self._pinned = pinned
        self._host: Array | None = None
        self._value: Any = None
        if device.kind == "cpu":
            self._host = np.zeros(self.shape, self.dtype)
            self.address = self._host.ctypes.data
        else:
            self._value = allocate(self.shape, dtype, device)
            self.address = self._value.data_ptr()
            cuda_memory.clear(self.address, self.nbytes, device.number)

    def like(self, shape: Sequence[int]) -> DeviceArray:
        """Zeros of another shape, of the same dtype, on the same device."""
        return DeviceArray(shape, self.name, self.device)

    @property
    def host(self) -> Array:
        """Its memory on the CPU; of a device's array memory to ``upload`` from and ``download`` to."""
        if self._host is None:
            make = cuda_memory.pinned if self._pinned else np.zeros
            self._host = make(self.shape, self.dtype)
        return self._host

    def upload(self, count: int | None = None) -> None:
        """Make the device see what was written to ``host``, or the first ``count`` elements as they lie."""
        if self._value is not None:
            size = self.nbytes if count is None else count * self.dtype.itemsize
            cuda_memory.copy(self.address, self.host.ctypes.data, size, cuda_memory.TO_DEVICE, self.device.number)

    def download(self) -> Array:
        """``host`` with what the device wrote, all runs before done; on the CPU no copy."""
        if self._value is not None:
            number = self.device.number
            cuda_memory.copy(self.host.ctypes.data, self.address, self.nbytes, cuda_memory.TO_HOST, number)
            cuda_memory.synchronize(number)
        return self.host

    def block(self, row: int, begin: int, count: int) -> Array:
        """Slots ``begin .. begin + count`` of a row of ``[B, K, S, D]``, ``[K, count, D]``: a view on the CPU, of a
        device's array a copy."""
        if self._value is None:
            return self.host[row, :, begin : begin + count]
        _, K, _, D = self.shape
        result: Array = np.empty((K, count, D), self.dtype)
        width = count * D * self.dtype.itemsize
        at, pitch = self._place(row, begin)
        cuda_memory.copy_strided(
            result.ctypes.data, width, at, pitch, width, K, cuda_memory.TO_HOST, self.device.number
        )
        cuda_memory.synchronize(self.device.number)
        return result

    def put_block(self, row: int, begin: int, values: Array) -> None:
        """Write ``[K, count, D]`` to the slots of a row from ``begin`` on."""
        if self._value is None:
            self.host[row, :, begin : begin + values.shape[1]] = values
            return
        values = np.ascontiguousarray(values, self.dtype)
        K, count, D = values.shape
        width = count * D * self.dtype.itemsize
        at, pitch = self._place(row, begin)
        cuda_memory.copy_strided(
            at, pitch, values.ctypes.data, width, width, K, cuda_memory.TO_DEVICE, self.device.number
        )
        cuda_memory.synchronize(self.device.number)  # ``values`` may go

    def copy_block(self, row: int, begin: int, source: DeviceArray, source_row: int, at: int, count: int) -> int:
        """Copy ``count`` slots of a row of another array of the device, or of this one, from its slot ``at`` on, to
        those of ``row`` from ``begin`` on; within one row they must not overlap. Returns the bytes copied."""
        _, K, _, D = self.shape
        width = count * D * self.dtype.itemsize
        if self._value is None:
            self.host[row, :, begin : begin + count] = source.host[source_row, :, at : at + count]
        else:
            cuda_memory.copy_strided(
                *self._place(row, begin),
                *source._place(source_row, at),
                width,
                K,
                cuda_memory.WITHIN,
                self.device.number,
            )
        return K * width

    def _place(self, row: int, slot: int) -> tuple[int, int]:
        """Address of a slot in ``[B, K, S, D]``, and bytes from head to head."""
        _, K, S, D = self.shape
        size = self.dtype.itemsize
        return self.address + (row * K * S + slot) * D * size, S * D * size

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
            *self.device,
            self._element,
            list(self.shape if shape is None else shape),
            self.address + offset * self.dtype.itemsize,
        )

    def bind_rows(self, binding: Any, name: str, row: int, rows: int, output: bool = False) -> None:
        """Bind the part ``[row : row + rows]`` of the first axis."""
        shape = self.shape[1:]
        self.bind(binding, name, output, (rows, *shape), row * math.prod(shape))
