"""Text of a Triton model's config.pbtxt, after ``model_config.proto``."""

from __future__ import annotations

import json

from pe_onnx import contract
from pe_onnx.bundle import Bundle

TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
IDLE_US = 600_000_000
"""After which a client that never ended its sequence loses it: ten minutes."""
SEQUENCES = 64
"""Open at once, for each instance of the model."""
ROWS = 8
"""Of a batch of the stateless variant."""


def stateful(bundle: Bundle, name: str) -> str:
    """One sequence at a time in a run, since Triton stacks no states of different lengths; many may be open.

    A state's first value has a 1 for each variable axis, whatever ``initial_state`` says, and no defined content unless
    it says ``zero_data`` (``SequenceStates::Initialize`` of Triton's core): a slot that the mask must leave out.
    """
    pairs = list(zip(contract.past_names(len(bundle.caches)), contract.present_names(len(bundle.caches)), strict=True))
    states = []
    for i, (past, present) in enumerate(pairs):
        K, D = bundle.caches[i // 2]
        states.append(
            f"    {{\n      input_name: {quoted(past)}\n      output_name: {quoted(present)}\n"
            f"      data_type: {TYPES[bundle.cache_dtype]}\n      dims: [ {K}, -1, {D} ]\n"
            f"      initial_state {{ name: {quoted('empty ' + past)} data_type: {TYPES[bundle.cache_dtype]} "
            f"dims: [ {K}, 1, {D} ] zero_data: true }}\n    }}"
        )
    batching = (
        f"sequence_batching {{\n  max_sequence_idle_microseconds: {IDLE_US}\n"
        f"  oldest {{ max_candidate_sequences: {SEQUENCES} }}\n  state [\n" + ",\n".join(states) + "\n  ]\n}\n"
    )
    return head(name, 1) + tensors("input", inputs()) + tensors("output", outputs(bundle)) + batching


def stateless(bundle: Bundle, name: str) -> str:
    """Keys and values go to the client and back; requests of equal shapes are batched."""
    caches = [cache for cache in bundle.caches for _ in ("key", "value")]
    kind = TYPES[bundle.cache_dtype]
    pasts, presents = (
        [(name, kind, (K, -1, D)) for name, (K, D) in zip(names, caches, strict=True)]
        for names in (contract.past_names(len(bundle.caches)), contract.present_names(len(bundle.caches)))
    )
    ins, outs = inputs() + pasts, outputs(bundle) + presents
    return head(name, ROWS) + tensors("input", ins) + tensors("output", outs) + "dynamic_batching { }\n"


Tensor = tuple[str, str, tuple[int, ...]]
"""Name, Triton's type and the shape without the batch."""


def inputs() -> list[Tensor]:
    return [(name, "TYPE_INT64", (-1,)) for name in contract.TOKEN_INPUTS]


def outputs(bundle: Bundle) -> list[Tensor]:
    return [("logits", "TYPE_FP32", (-1 if bundle.logits == "all" else 1, bundle.shape["vocab_size"]))]


def head(name: str, rows: int) -> str:
    return f'name: {quoted(name)}\nbackend: "onnxruntime"\nmax_batch_size: {rows}\n'


def tensors(kind: str, entries: list[Tensor]) -> str:
    lines = (
        f"  {{ name: {quoted(name)} data_type: {dtype} dims: [ {', '.join(map(str, shape))} ] }}"
        for name, dtype, shape in entries
    )
    return f"{kind} [\n" + ",\n".join(lines) + "\n]\n"


def quoted(text: str) -> str:
    """A string of protobuf's text format, and of YAML."""
    return json.dumps(text)
