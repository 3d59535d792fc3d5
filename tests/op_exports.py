"""Modules around one operator each, and the ONNX files that they are exported to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from op_inputs import (
    CACHED,
    F16,
    F32,
    cached_arguments,
    compact_inputs,
    cross_arguments,
    encoder_arguments,
    masked_arguments,
    positions,
    randn,
    rotary_inputs,
)
from op_oracles import Array
from torch import nn

import pe_onnx.custom_ops as ops


class Calls(nn.Module):
    """A module of a user's own around one call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors)


@dataclasses.dataclass
class Exported:
    path: Path
    call: Callable[..., Any]

    def __post_init__(self) -> None:
        self.model = onnx.load(self.path)
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def feed(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, Array]:
        names = [i.name for i in self.session.get_inputs()]
        return {name: x.numpy() for name, x in zip(names, tensors, strict=True)}

    def run(self, *tensors: torch.Tensor) -> list[Array]:
        return self.session.run(None, self.feed(tensors))

    def evaluate(self, *tensors: torch.Tensor) -> list[Array]:
        """By onnx's own reference implementation."""
        return ReferenceEvaluator(self.model).run(None, self.feed(tensors))


def largest_outputs(path: Path, tensors: tuple[torch.Tensor, ...], folder: Path) -> dict[str, int]:
    """Operators that a run executes, subgraphs included, and the bytes of the greatest output of each."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), tensors, strict=True)})
    sizes: dict[str, int] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            name = event["args"]["op_name"]
            sizes[name] = max(sizes.get(name, 0), int(event["args"]["output_size"]))
    return sizes


def rotary(num_heads: int, interleaved: bool) -> Callable[..., torch.Tensor]:
    return lambda x, cos, sin: ops.rotary_embedding(x, cos, sin, num_heads, interleaved)


def masked(softcap: float) -> Callable[..., Any]:
    return lambda *tensors: ops.masked_attention(*tensors, 4, 2, 0.7, softcap)


def cached(softcap: float, window: int, biased: bool) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> Any:
        return ops.cached_attention(*tensors, *(() if biased else (None,)), 4, 2, 0.5, softcap, window)

    return call


def compact_t5(weight: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ops.t5_relative_bias(weight, queries, None, mask.shape[1], 20)


def general_t5(weight: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return ops.t5_relative_bias(weight, queries, keys, keys.shape[1], 20)


def encoder_t5(weight: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return ops.t5_relative_bias(weight, queries, keys, keys.shape[1], 20, True)


def band(weight: torch.Tensor) -> torch.Tensor:
    return ops.relative_band(weight, 20, 8)


def encoder(*tensors: torch.Tensor) -> torch.Tensor:
    return ops.encoder_attention(*tensors, 3, 0.5)


def cross(*tensors: torch.Tensor) -> Any:
    return ops.cross_attention(*tensors, 3, 0.5)


ROWS = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
CACHE = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
MASK = {**ROWS, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
QKV = (ROWS, ROWS, ROWS, CACHE, CACHE)
HEADS = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
MODULES: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    # name: operator in the file, call, arguments that are traced, dynamic axes
    "rotary": ("RotaryEmbedding", rotary(0, False), rotary_inputs(2, 5, False), (HEADS, ROWS, ROWS)),
    "rotary-interleaved": ("RotaryEmbedding", rotary(0, True), rotary_inputs(2, 5, False), (HEADS, ROWS, ROWS)),
    "rotary-packed": ("RotaryEmbedding", rotary(3, False), rotary_inputs(2, 5, True), (ROWS, ROWS, ROWS)),
    "rotary-packed-interleaved": ("RotaryEmbedding", rotary(3, True), rotary_inputs(2, 5, True), (ROWS, ROWS, ROWS)),
    "rotary-float16": ("RotaryEmbedding", rotary(3, False), rotary_inputs(2, 5, True, F16), (ROWS, ROWS, ROWS)),
    "masked-bool": (
        "MaskedAttention",
        masked(0.0),
        masked_arguments(2, 3, 4)[:6],
        (*QKV, {0: ROWS[0], 2: ROWS[0], 3: ROWS[0]}),
    ),
    "masked-added": (
        "MaskedAttention",
        masked(1.5),
        masked_arguments(2, 3, 4, "added")[:6],
        (*QKV, {0: ROWS[0], 2: ROWS[0], 3: ROWS[0]}),
    ),
    "alibi": (
        "AlibiBias",
        ops.alibi_bias,
        (randn(5), positions(4, 9, count=3), positions(0, 1, count=7)),
        ({}, ROWS, ROWS),
    ),
    "alibi-float16": (
        "AlibiBias",
        ops.alibi_bias,
        (randn(5, dtype=F16), positions(4, 9, count=3), positions(0, count=7)),
        ({}, ROWS, {1: ROWS[0]}),
    ),
    "t5": (
        "T5RelativeBias",
        general_t5,
        (randn(8, 3), positions(4, 9, count=3), positions(0, 1, count=7)),
        ({}, ROWS, ROWS),
    ),
    "t5-bidirectional": (
        "T5RelativeBias",
        encoder_t5,
        (randn(9, 3), positions(4, 9, count=3), positions(0, 1, count=7)),
        ({}, ROWS, ROWS),
    ),
    "t5-compact": ("T5RelativeBias", compact_t5, compact_inputs(7, 4, 4, count=3), ({}, ROWS, ROWS)),
    "band": ("RelativeBand", band, (randn(12, 3),), ({},)),
    **{
        f"encoder{name}": (
            "EncoderAttention",
            encoder,
            (*encoder_arguments(2, 11, dtype)[:4], band(randn(12, 3, dtype=dtype))),
            (ROWS, ROWS, ROWS, ROWS, {}),
        )
        for name, dtype in (("", F32), ("-float16", F16))
    },
    **{
        f"cross{name}": (
            "CrossAttention",
            cross,
            cross_arguments(2, 3, 11, True, dtype),
            (ROWS, ROWS, {}, {}, CACHE, CACHE, ROWS),
        )
        for name, dtype in (("", F32), ("-float16", F16))
    },
    **{
        call.module: (
            "CachedAttention",
            cached(call.softcap, call.window, call.bias is not None),
            cached_arguments(3, 4, [7, 5], call.bias and "row")[: 8 if call.bias else 7],
            (*QKV, {0: ROWS[0]}, {}, *([MASK] if call.bias else [])),
        )
        for call in CACHED.values()
    },
}
Get = Callable[[str], Exported]


def save(call: Callable[..., Any], args: tuple[Any, ...], dynamic: tuple[Any, ...] | None, path: Path) -> Exported:
    program = torch.onnx.export(
        Calls(call).eval(),
        args,
        dynamo=True,
        opset_version=23,
        custom_translation_table=ops.translation_table(),
        dynamic_shapes=None if dynamic is None else (dynamic,),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return Exported(path, call)


def at_first_call(folder: Path) -> Get:
    """A name in MODULES to its file in the folder, which is written when it is first asked for."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            _, call, args, dynamic = MODULES[name]
            made[name] = save(call, args, dynamic, folder / f"{name}.onnx")
        return made[name]

    return get
