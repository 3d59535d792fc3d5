"""Who is measured in ``peers.py``: how each one's model is made, what it runs in, and the dtype of its cache.

Precision is equal within a group, named by the bits of a weight. Peers are built as their tools build them; genai,
which by default makes the logits of every token of a prompt, is also built with ``prune_lm_head``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
OURS, GENAI, LLAMA_CPP, OPTIMUM = "ours", "genai", "llama_cpp", "optimum"
BLOCK = 32
COMMAND_LINE = "from pe_onnx.cli import main; main()"

Places = Mapping[str, Path]
"""``python:NAME``, the interpreter of an environment; ``packaged``, the GGUF file; otherwise artefacts by name."""
Command = list[str]


class Recipe(NamedTuple):
    """How an artefact is made from others, by one command that is measured."""

    needs: tuple[str, ...]
    """Artefacts."""
    environment: str
    command: Callable[[Places, Path], Command]
    suffix: str = ""


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    bits: int
    """Of a weight, but for embeddings, norms and scales."""
    environment: str
    script: str
    artefact: str
    cache_bytes: int
    """Of one number in the cache."""
    weight_bytes: int | None = None
    """Of one weight, where the engine converts those of the artefact when it loads them."""
    options: dict[str, Any] = field(default_factory=dict)


def _genai(precision: str, pruned: bool) -> Recipe:
    def command(places: Places, output: Path) -> Command:
        builder = [str(places["python:ours"]), "-m", "onnxruntime_genai.models.builder"]
        options = ["--extra_options", "prune_lm_head=true"] if pruned else []
        cache = output.with_name("genai_cache")
        paths = ["-i", str(places["checkpoint"]), "-o", str(output), "-c", str(cache)]
        return [*builder, *paths, "-p", precision, "-e", "cpu", *options]

    return Recipe(("checkpoint",), OURS, command)


def _llama_cpp(kind: str) -> Recipe:
    def command(places: Places, output: Path) -> Command:
        script = str(HERE / "peer_llama_cpp.py")
        return [str(places["python:llama_cpp"]), script, str(places["gguf_f32"]), str(output), kind]

    return Recipe(("gguf_f32",), LLAMA_CPP, command, ".gguf")


def _export(dtype: str) -> Recipe:
    def command(places: Places, output: Path) -> Command:
        pe_onnx = [str(places["python:ours"]), "-c", COMMAND_LINE, "export"]
        paths = ["--model", str(places["checkpoint"]), "-o", str(output), "--force"]
        return [*pe_onnx, *paths, "--dtype", dtype]

    return Recipe(("checkpoint",), OURS, command)


def _quantize(bits: int, *options: str) -> Recipe:
    def command(places: Places, output: Path) -> Command:
        pe_onnx = [str(places["python:ours"]), "-c", COMMAND_LINE, "quantize"]
        paths = [str(places["ours_fp32"]), "-o", str(output)]
        return [*pe_onnx, *paths, "--bits", str(bits), "--block", str(BLOCK), *options]

    return Recipe(("ours_fp32",), OURS, command)


RECIPES: dict[str, Recipe] = {
    "gguf_f32": Recipe(
        ("checkpoint",),
        OURS,
        lambda places, output: [
            str(places["python:ours"]),
            str(HERE / "peer_gguf.py"),
            str(places["checkpoint"]),
            str(places["packaged"]),
            str(output),
        ],
        ".gguf",
    ),
    "gguf_q8_0": _llama_cpp("Q8_0"),
    "gguf_q4_0": _llama_cpp("Q4_0"),
    "gguf_q4_1": _llama_cpp("Q4_1"),
    "genai_fp32": _genai("fp32", False),
    "genai_int4": _genai("int4", False),
    "genai_int4_pruned": _genai("int4", True),
    "ours_fp32": _export("fp32"),
    "ours_fp16": _export("fp16"),
    "ours_int8": _quantize(8),
    "ours_int4": _quantize(4),
    "ours_int4_head4": _quantize(4, "--head-bits", "4"),
    "ours_int4_kv8": _quantize(4, "--cache", "int8"),
    "ours_int4_zeros": _quantize(4, "--asymmetric"),
    "ours_int4_zeros_head4": _quantize(4, "--asymmetric", "--head-bits", "4"),
    "optimum_fp32": Recipe(
        ("checkpoint",),
        OPTIMUM,
        lambda places, output: [
            str(places["python:optimum"]),
            str(HERE / "peer_optimum.py"),
            str(places["checkpoint"]),
            str(output),
        ],
    ),
}
"""Artefacts but the checkpoint, by name."""

CONTESTANTS = [
    Contestant("ours_fp32", "pe-onnx fp32", 32, OURS, "peer_ours.py", "ours_fp32", 4),
    Contestant("ours_fp16", "pe-onnx fp16", 16, OURS, "peer_ours.py", "ours_fp16", 2),
    Contestant("ours_int8", "pe-onnx int8", 8, OURS, "peer_ours.py", "ours_int8", 4),
    Contestant("ours_int4", "pe-onnx int4", 4, OURS, "peer_ours.py", "ours_int4", 4),
    Contestant("ours_int4_head4", "pe-onnx int4, --head-bits 4", 4, OURS, "peer_ours.py", "ours_int4_head4", 4),
    Contestant("ours_int4_kv8", "pe-onnx int4, int8 cache", 4, OURS, "peer_ours.py", "ours_int4_kv8", 1),
    Contestant("ours_int4_zeros", "pe-onnx int4, --asymmetric", 4, OURS, "peer_ours.py", "ours_int4_zeros", 4),
    Contestant(
        "ours_int4_zeros_head4",
        "pe-onnx int4, --asymmetric --head-bits 4",
        4,
        OURS,
        "peer_ours.py",
        "ours_int4_zeros_head4",
        4,
    ),
    Contestant("genai_fp32", "onnxruntime-genai fp32", 32, GENAI, "peer_genai.py", "genai_fp32", 4),
    Contestant("genai_int4", "onnxruntime-genai int4", 4, GENAI, "peer_genai.py", "genai_int4", 4),
    Contestant(
        "genai_int4_pruned",
        "onnxruntime-genai int4, prune_lm_head",
        4,
        GENAI,
        "peer_genai.py",
        "genai_int4_pruned",
        4,
    ),
    Contestant(
        "llama_cpp_f32",
        "llama.cpp F32",
        32,
        LLAMA_CPP,
        "peer_llama_cpp.py",
        "gguf_f32",
        4,
        options={"cache": "F32"},
    ),
    Contestant("llama_cpp_q8_0", "llama.cpp Q8_0", 8, LLAMA_CPP, "peer_llama_cpp.py", "gguf_q8_0", 2),
    Contestant("llama_cpp_q4_0", "llama.cpp Q4_0", 4, LLAMA_CPP, "peer_llama_cpp.py", "gguf_q4_0", 2),
    Contestant("llama_cpp_q4_1", "llama.cpp Q4_1", 4, LLAMA_CPP, "peer_llama_cpp.py", "gguf_q4_1", 2),
    Contestant(
        "transformers_eager",
        "transformers fp32, eager attention",
        32,
        OURS,
        "peer_transformers.py",
        "checkpoint",
        4,
        options={"attention": "eager"},
    ),
    Contestant("transformers_sdpa", "transformers fp32, SDPA", 32, OURS, "peer_transformers.py", "checkpoint", 4),
    Contestant(
        "transformers_bf16",
        "transformers bf16, SDPA",
        16,
        OURS,
        "peer_transformers.py",
        "checkpoint",
        2,
        weight_bytes=2,
        options={"dtype": "bfloat16"},
    ),
    Contestant("optimum_fp32", "optimum fp32", 32, OPTIMUM, "peer_optimum.py", "optimum_fp32", 4),
]
REFERENCE = next(c for c in CONTESTANTS if c.name == "transformers_sdpa")
"""Of what the others' logits are compared with."""
QUALITY = [
    "ours_fp16",
    "ours_int8",
    "ours_int4",
    "ours_int4_head4",
    "ours_int4_kv8",
    "ours_int4_zeros",
    "ours_int4_zeros_head4",
    "genai_int4",
    "llama_cpp_q8_0",
    "llama_cpp_q4_0",
    "llama_cpp_q4_1",
    "transformers_bf16",
]
"""Of whom KL and bits per byte are measured."""


def select(names: str | None) -> list[Contestant]:
    """Contestants by comma-separated names, all without. Raises ValueError for one that is none."""
    if names is None:
        return list(CONTESTANTS)
    known = {contestant.name: contestant for contestant in CONTESTANTS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{unknown[0]!r} is no contestant; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def interpreter() -> Path:
    """Of ours and of transformers."""
    return Path(sys.executable)
