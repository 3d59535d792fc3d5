"""What a step and a prompt take at least on this machine: bytes over its read bandwidth, operations over its GEMM rate.

    decode  >= (weight bytes of a step + cache bytes in use) / bandwidth
    prefill >= (2 n weights of the blocks + 2 weights of the head + 2 n^2 layers heads D) / GEMM rate

Weight bytes are those of the tensors that a step reads whole, as stored: an embedding table that is only looked up is
left out, one that is the head as well counts once. The rate is of float32, whatever the contestant computes in. Weights
that fit the processor's last cache can be read faster than memory: such a share is above what memory allows.

    python benchmarks/peer_bounds.py [--threads 2]     # prints both rates as JSON
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

READ_BYTES = 1 << 30
GEMM_WIDTH = 2048
REPEATS = 7


class Shape(NamedTuple):
    """Of the model: what the bounds need."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    mlp_width: int
    vocab_size: int

    @classmethod
    def of(cls, checkpoint: Path) -> Shape:
        config = json.loads((checkpoint / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            width=config["hidden_size"],
            mlp_width=config["intermediate_size"],
            vocab_size=config["vocab_size"],
        )

    @property
    def block_weights(self) -> int:
        """Of all layers' matrices."""
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    def cache_numbers(self, tokens: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * tokens

    def prompt_operations(self, tokens: int) -> int:
        """Multiplications and additions of a prompt, its attention causal, the head at its last token."""
        attention = 2 * tokens * tokens * self.layers * self.heads * self.head_size
        return 2 * tokens * self.block_weights + attention + 2 * self.width * self.vocab_size


def decode_bound_ms(weight_bytes: int, cache_bytes: int, bytes_per_s: float) -> float:
    return 1000 * (weight_bytes + cache_bytes) / bytes_per_s


def prefill_bound_s(shape: Shape, tokens: int, operations_per_s: float) -> float:
    return shape.prompt_operations(tokens) / operations_per_s


def step_bytes(artefact: Path) -> int:
    """Bytes of weights that a decode step reads: a GGUF file, or a folder with ONNX graphs or safetensors."""
    if artefact.suffix == ".gguf":
        return gguf_step_bytes(artefact)
    graphs = [path for path in sorted(artefact.rglob("*.onnx")) if "split" not in path.name]
    if graphs:
        return onnx_step_bytes(graphs[0])
    return safetensors_bytes(artefact)


def gguf_step_bytes(path: Path) -> int:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:  # the head is another tensor, and the embedding is only looked up
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def onnx_step_bytes(path: Path) -> int:
    """Of all initializers but those that are only looked up in."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    model = onnx.load(path, load_external_data=False)
    looked_up: set[str] = set()
    read: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":  # its scales and zero points too
            looked_up.update(node.input)
        elif node.op_type == "Gather":
            looked_up.add(node.input[0])
        else:
            read.update(node.input)
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name in looked_up - read:
            continue
        total += ExternalDataInfo(tensor).length or 0 if uses_external_data(tensor) else len(tensor.SerializeToString())
    return total


def safetensors_bytes(folder: Path) -> int:
    """The tensors' bytes; tied ones are stored once."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return total


def machine_rates(threads: int) -> dict[str, float]:
    """The best of several: a sum over 1 GiB, and a product of square float32 matrices, with ``threads`` threads."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(READ_BYTES // 8, dtype=torch.float64)
    read_s = best_s(data.sum)
    left, right = torch.randn(2, GEMM_WIDTH, GEMM_WIDTH)
    product_s = best_s(lambda: left @ right)
    return {"read_bytes_per_s": READ_BYTES / read_s, "gemm_operations_per_s": 2 * GEMM_WIDTH**3 / product_s}


def best_s(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(machine_rates(parser.parse_args().threads)))
