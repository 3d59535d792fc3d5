"""GroupQueryAttention alone on a CUDA device: a decode step with and without a bias, and with wider heads.

ALiBi needs no bias where a head has a few channels more: a query's hold the slope, a key's its position, in pieces that
half precision holds exactly, and their product is the penalty (``passes/alibi_channels.py``: 8 more). Attention stays
on the flash path then, and the cache grows by those channels. Wider heads stand for that here. Layers are chained and
recorded as one CUDA graph; given is the time of one.

    python benchmarks/cuda_attention.py [--contexts 1024,8192,32768] [-o benchmarks/cuda_attention.json]
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from pe_onnx.doctor import cuda as cuda_facts
from pe_onnx.machine import versions
from pe_onnx.providers import Device, onnxruntime, provider_list

LAYERS, WARM_UP, REPEATS = 8, 8, 17
HEADS = ((32, 8), (12, 12))
"""Of queries, and of keys and values."""
CASES = {
    "64 channels": (64, False),
    "64 channels, bias": (64, True),
    "72 channels": (72, False),
    "80 channels": (80, False),
}
CUDA = Device("cuda")


def model(heads: int, kv_heads: int, channels: int, bias: bool) -> bytes:
    """LAYERS of attention on each other's outputs, float16, all with the same new keys and values."""
    from onnx import TensorProto, helper

    half = TensorProto.FLOAT16

    def tensor(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, half, shape)

    inputs = [
        tensor("query", 1, 1, heads * channels),
        tensor("key", 1, 1, kv_heads * channels),
        tensor("value", 1, 1, kv_heads * channels),
        helper.make_tensor_value_info("last_slots", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total_length", TensorProto.INT32, [1]),
        *([tensor("bias", 1, heads, 1, "S")] if bias else []),
    ]
    nodes, outputs, given = [], [], "query"
    for i in range(LAYERS):
        caches = [f"{part}.{i}" for part in ("past_key", "past_value", "present_key", "present_value")]
        inputs += [tensor(name, 1, kv_heads, "S", channels) for name in caches[:2]]
        outputs += [tensor(name, 1, kv_heads, "S", channels) for name in caches[2:]]
        names = [
            given,
            "key",
            "value",
            *caches[:2],
            "last_slots",
            "total_length",
            *(["", "", "", "bias"] if bias else []),
        ]
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": channels**-0.5}
        made = [f"output.{i}", *caches[2:]]
        nodes.append(helper.make_node("GroupQueryAttention", names, made, domain="com.microsoft", **attributes))
        given = made[0]
    outputs.append(tensor(given, 1, 1, heads * channels))
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialized


def step_us(session: Any, context: int, number: int) -> float:
    """Microseconds of one layer behind ``context`` tokens. number: of the CUDA graph."""
    rng = np.random.default_rng(0)
    binding, held, caches = session.io_binding(), [], {}
    for given in session.get_inputs():
        shape = [context if isinstance(n, str) else n for n in given.shape]
        if given.name == "total_length":
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.array([context], np.int32)))
        elif given.name == "last_slots":
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.array([context - 1], np.int32), *CUDA))
        else:
            values = rng.standard_normal(shape, np.float32).astype(np.float16)
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(values, *CUDA))
        binding.bind_ortvalue_input(given.name, held[-1])
        caches[given.name.replace("past", "present")] = held[-1]
    for made in session.get_outputs():
        output = caches.get(made.name)
        if output is None:
            output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(made.shape, np.float16, *CUDA)
            held.append(output)
        binding.bind_ortvalue_output(made.name, output)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    times = []
    for _ in range(WARM_UP + REPEATS):
        begin = time.perf_counter()
        session.run_with_iobinding(binding, options)
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times[WARM_UP:]) / LAYERS


@click.command()
@click.option("--contexts", default="1024,8192,32768", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(contexts: str, output: Path) -> None:
    """Measure attention alone."""
    lengths = [int(part) for part in contexts.split(",")]
    result: dict[str, Any] = {"cuda": cuda_facts(), "versions": versions(("onnxruntime-gpu",)), "layer_us": {}}
    for heads, kv_heads in HEADS:
        for name, (channels, bias) in CASES.items():
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            made = model(heads, kv_heads, channels, bias)
            session = onnxruntime.InferenceSession(made, options, providers=provider_list("cuda", True))
            figures = {str(n): round(step_us(session, n, i + 1), 1) for i, n in enumerate(lengths)}
            result["layer_us"][f"{heads} heads on {kv_heads}, {name}"] = figures
            click.echo(f"{heads} heads on {kv_heads}, {name}: {figures}", err=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
