"""Arrays on a device, and caches on them, with the device's memory played by the host's: every copy that a cache asks
for is made by the functions that CUDA has, on memory that numpy cannot see otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_script import script
from conftest import Bundles

import pe_onnx
from pe_onnx import contract, cuda_memory, device_arrays
from pe_onnx.device_arrays import DeviceArray
from pe_onnx.kv_cache import LEAST_RECORDED, InPlaceCache, make_cache, recorded_length
from pe_onnx.providers import Device
from pe_onnx.reordering import reorder_rows
from pe_onnx.session import Session

CUDA = Device("cuda")
Array = np.ndarray[Any, Any]


class Memory:
    """What ``allocate`` gives: an address, and garbage there."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(max(size, 1), 0x5A, np.uint8)

    def data_ptr(self) -> int:
        return self.bytes.ctypes.data


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The host's memory as the device's; the copies made, with their bytes."""
    made: list[tuple[str, int]] = []
    names = {cuda_memory.TO_DEVICE: "up", cuda_memory.TO_HOST: "down", cuda_memory.WITHIN: "within"}

    def allocate(shape: Sequence[int], dtype: str, device: Device) -> Memory:
        assert device.kind == "cuda"
        return Memory(int(np.prod(shape)) * contract.storage_dtype(dtype).itemsize)

    def copy(to: int, source: int, size: int, kind: int, device: int) -> None:
        made.append((names[kind], size))
        ctypes.memmove(to, source, size)

    def strided(
        to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, device: int
    ) -> None:
        made.append((names[kind], width * height))
        assert width <= min(to_pitch, source_pitch) or height < 2
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

    def clear(address: int, size: int, device: int) -> None:
        ctypes.memset(address, 0, size)

    monkeypatch.setattr(device_arrays, "allocate", allocate)
    monkeypatch.setattr(cuda_memory, "copy", copy)
    monkeypatch.setattr(cuda_memory, "copy_strided", strided)
    monkeypatch.setattr(cuda_memory, "clear", clear)
    monkeypatch.setattr(cuda_memory, "pinned", lambda shape, dtype: np.zeros(shape, dtype))
    monkeypatch.setattr(cuda_memory, "synchronize", lambda device: None)
    return made


def filled(values: Array, device: Device) -> DeviceArray:
    array = DeviceArray(values.shape, str(values.dtype), device)
    array.host[...] = values
    array.upload()
    return array


def test_an_array_begins_with_zeros_and_keeps_what_is_uploaded(pretended: list[tuple[str, int]]) -> None:
    array = DeviceArray((2, 3), "float32", CUDA)
    assert not array.download().any()
    array.host[...] = np.arange(6).reshape(2, 3)
    assert pretended == [("down", 24)]
    array.upload(4)
    array.host[...] = 0
    np.testing.assert_array_equal(array.download(), [[0, 1, 2], [3, 0, 0]])
    assert pretended[1:] == [("up", 16), ("down", 24)]


@pytest.mark.parametrize("device", [Device("cpu"), CUDA])
def test_blocks_are_what_numpy_calls_them(pretended: list[tuple[str, int]], device: Device) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 9, 4)).astype(np.float32)
    array, other = filled(values, device), filled(-values, device)
    np.testing.assert_array_equal(array.block(1, 2, 5), values[1, :, 2:7])
    array.put_block(2, 6, np.ones((2, 3, 4), np.float32))
    values[2, :, 6:] = 1
    assert array.copy_block(0, 1, other, 2, 3, 4) == 2 * 4 * 4 * 4
    values[0, :, 1:5] = -np.random.default_rng(0).standard_normal((3, 2, 9, 4)).astype(np.float32)[2, :, 3:7]
    assert array.copy_block(0, 1, other, 2, 3, 0) == 0
    np.testing.assert_array_equal(array.download(), values)


def test_keys_and_values_have_no_copy_on_the_host(pretended: list[tuple[str, int]]) -> None:
    array = DeviceArray((2, 2, 8, 4), "float16", CUDA)
    array.copy_block(0, 0, array, 1, 4, 4)
    array.put_block(1, 0, array.block(0, 2, 3))
    assert array._host is None
    assert [kind for kind, _ in pretended] == ["within", "down", "up"]


@pytest.mark.parametrize("parents", [[1, 0, 2], [2, 2, 0], [0, 0, 0], [1, 2, 0]])
def test_rows_are_reordered_on_the_device(pretended: list[tuple[str, int]], parents: list[int]) -> None:
    values = np.random.default_rng(1).standard_normal((3, 2, 6, 4)).astype(np.float32)
    slots = {b: slice(1, 5) for b, parent in enumerate(parents) if b != parent}
    arrays = [filled(values, CUDA), filled(2 * values, CUDA)]
    pretended.clear()
    moved = reorder_rows(arrays, parents, slots)
    assert {kind for kind, _ in pretended} == {"within"}
    assert moved == sum(size for _, size in pretended)
    wanted = values.copy()
    for b in slots:
        wanted[b, :, 1:5] = values[parents[b], :, 1:5]
    for array, factor in zip(arrays, (1, 2), strict=True):
        np.testing.assert_array_equal(array.download(), factor * wanted)


class BoundOnHost(DeviceArray):
    """A device's array that onnxruntime's CPU reads and writes."""

    def bind(self, binding: Any, name: str, output: bool = False, shape: Any = None, offset: int = 0) -> None:
        bind = binding.bind_output if output else binding.bind_input
        sizes = list(self.shape if shape is None else shape)
        bind(name, "cpu", 0, self._element, sizes, self.address + offset * self.dtype.itemsize)


@pytest.fixture
def device_session(
    bundles: Bundles, pretended: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Session, list[int | None]]:
    """A session on the CPU whose caches take it for a device that records; and the numbers of what was run."""
    session = Session(pe_onnx.load(bundles("alibi", "ort")).bundle, threads=1)
    runs: list[int | None] = []
    run = session.run

    def noting(binding: Any, recorded: int | None = None) -> None:
        runs.append(recorded)
        run(binding)

    monkeypatch.setattr(session, "array", lambda shape, dtype, pinned=False: BoundOnHost(shape, dtype, CUDA, pinned))
    monkeypatch.setattr(session, "run", noting)
    monkeypatch.setattr(session, "not_captured", None)
    return session, runs


def test_a_cache_on_a_device_gives_the_same_numbers(
    device_session: tuple[Session, list[int | None]], pretended: list[tuple[str, int]], bundles: Bundles
) -> None:
    """Steps of the device have longer masks, so that the sums of a softmax may be taken in another order."""
    session, runs = device_session
    cache = make_cache(session, 3, 400)
    assert isinstance(cache, InPlaceCache)
    made = script(cache, 30)
    wanted = script(make_cache(Session(session.bundle, threads=1), 3, 400), 30)
    for have, want in zip(made, wanted, strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5 * want.std())
    assert runs[0] is None
    steps = [number for number in runs if number is not None]
    assert len(steps) == 34
    assert len(set(steps)) == 4  # of 256 tokens; in the greater buffers of 400, and of 256; and with six rows
    assert all(buffer._host is None for buffer in cache.buffers)


def test_a_cache_is_saved_from_a_device(
    device_session: tuple[Session, list[int | None]], bundles: Bundles, tmp_path: Path
) -> None:
    session, _ = device_session
    cache = make_cache(session, 1, 200)
    cache.prefill([list(range(50))])
    cache.save(tmp_path / "saved")
    model = pe_onnx.load(session.bundle.folder, threads=1)
    other = model.load_cache(tmp_path / "saved")
    np.testing.assert_allclose(other.decode([3]), cache.decode([3]), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1000, 1025, 1281, 5000, 33_000])
def test_recorded_steps_differ_by_a_quarter_at_most(tokens: int) -> None:
    length = recorded_length(tokens, 1 << 30)
    assert tokens <= length <= max(1.25 * tokens, LEAST_RECORDED * -(-tokens // LEAST_RECORDED))
    assert recorded_length(length, 1 << 30) == length
    assert recorded_length(tokens, tokens) == tokens


def test_there_are_few_recordings() -> None:
    assert len({recorded_length(n, 1 << 30) for n in range(1, 32_769)}) <= 30


def test_bfloat16_is_rounded_to_the_nearest_as_pytorch_rounds() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(1e3)
    values[:4] = [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8]
    bits = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(contract.stored(values, "bfloat16"), bits)
    assert contract.storage_dtype("bfloat16") == np.uint16
    np.testing.assert_array_equal(contract.stored(values, "float16"), values.astype(np.float16))
