"""CachedAttention: against loops, and its ONNX function in onnxruntime, into a bound buffer too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from op_exports import Get
from op_inputs import CACHED, cached_arguments
from op_oracles import Array, attended, cache_after, heads_first
from torch import nn

import pe_onnx.custom_ops as ops

pytestmark = pytest.mark.usefixtures("one_thread")


def cached_truth(case: str) -> tuple[tuple[Any, ...], Array, Array, Array, list[int]]:
    """Arguments up to the window, and in float64 output, keys, values, and each row's first new slot."""
    c = CACHED[case]
    args = cached_arguments(c.T, c.P, c.lengths, c.bias, total=c.total)
    query, key, value, past_key, past_value, last, _, added, _, _, scale = args
    (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)

    def seen(b: int, i: int, j: int) -> bool:
        at = starts[b] + i
        padding = at >= c.lengths[b]  # what its output is, is not specified: let it see its own slot
        return j == at if padding else (j <= at and (c.window < 0 or j > at - c.window))

    padded = None if added is None else nn.functional.pad(added, (0, c.P + c.T - added.shape[3]))
    want = attended(query, keys, values, seen, scale, c.softcap, padded)
    return (*args, c.softcap, c.window), want, keys, values, starts


def assert_specified_parts_agree(
    got: tuple[Any, Any, Any], want: tuple[Array, Array, Array], lengths: list[int], starts: list[int], atol: float
) -> None:
    """The outputs of tokens and the slots that hold tokens; padding's are unspecified."""
    for b, length in enumerate(lengths):
        tokens = length - starts[b]
        np.testing.assert_allclose(np.asarray(got[0])[b, :tokens], want[0][b, :tokens], atol=atol)
        for present, rows in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(np.asarray(present)[b, :, :length], rows[b, :, :length], atol=1e-6)


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_is_the_plain_formula(case: str) -> None:
    args, want, keys, values, starts = cached_truth(case)
    got = ops.cached_attention(*args)
    assert_specified_parts_agree(got, (want, keys, values), CACHED[case].lengths, starts, 1e-5)


def test_the_cases_of_cached_attention_tell_their_options_apart() -> None:
    for case in ("decode-ragged-window", "chunk-window", "decode-ragged-softcap", "chunk-bias", "softcap-bias"):
        args, want, _, _, _ = cached_truth(case)
        plain = list(args)
        plain[7], plain[11], plain[12] = None, 0.0, -1
        assert np.abs(ops.cached_attention(*plain)[0].numpy() - want).max() > 0.1, case
    args, want, _, _, _ = cached_truth("chunk-window")
    assert np.abs(ops.cached_attention(*args[:-1], args[-1] + 1)[0].numpy() - want).max() > 0.1


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_in_onnxruntime(case: str, exported: Get) -> None:
    args, want, keys, values, starts = cached_truth(case)
    got = exported(CACHED[case].module).run(*(x for x in args[:8] if x is not None))
    assert_specified_parts_agree(tuple(got), (want, keys, values), CACHED[case].lengths, starts, 1e-5)


def test_cached_attention_writes_into_a_bound_buffer(exported: Get) -> None:
    model, capacity = exported("cached-0.0--1-False"), 33
    buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, capacity, 16), np.float32)) for _ in range(2)]
    names = [i.name for i in model.session.get_inputs()]
    outputs = [o.name for o in model.session.get_outputs()]
    new = cached_arguments(17, 0, [17])[:3]
    for start, stop in [(0, 11), (11, 12), (12, 17)]:
        binding = model.session.io_binding()
        for name, x in zip(names[:3], new, strict=True):
            binding.bind_cpu_input(name, x[:, start:stop].contiguous().numpy())
        binding.bind_output(outputs[0])
        for name, out, buffer in zip(names[3:5], outputs[1:], buffers, strict=True):
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(out, buffer)
        for name, last in zip(names[5:], (stop - 1, stop), strict=True):
            binding.bind_cpu_input(name, np.array([last], np.int32))
        model.session.run_with_iobinding(binding)
    keys, values = heads_first(new[1], 2), heads_first(new[2], 2)
    want = attended(new[0], keys, values, lambda b, i, j: j <= i, 0.5)
    np.testing.assert_allclose(binding.get_outputs()[0].numpy(), want[:, 12:], atol=1e-5)
    for buffer, rows in zip(buffers, (keys, values), strict=True):
        np.testing.assert_allclose(buffer.numpy()[:, :, :17], rows, atol=1e-6)
        assert not buffer.numpy()[:, :, 17:].any()
