"""A Hugging Face folder of SmolLM2 as a float32 GGUF file, with the metadata of the packaged one.

llama.cpp's own converter is no part of its Python package. Tensors are named and, for queries and keys, permuted as
that converter does: GGUF holds neighbouring channels as RoPE's pairs, transformers holds halves.

    python benchmarks/peer_gguf.py CHECKPOINT PACKAGED.gguf OUTPUT.gguf
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Parts of a Llama's tensor names in transformers, and in GGUF."""
OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")
"""Written by the writer itself, or not true of float32."""


def gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` to ``blk.3.attn_q.weight``."""
    layer = re.sub(r"^model\.layers\.(\d+)\.(.+)\.weight$", lambda m: f"blk.{m[1]}.{NAMES[m[2]]}.weight", name)
    return layer if layer != name else f"{NAMES[name.removesuffix('.weight')]}.weight"


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows ``[H * 2 * D/2, C]``, halves of each head, to neighbouring pairs ``[H * D/2 * 2, C]``."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert(checkpoint: Path, packaged: Path, output: Path) -> None:
    import gguf
    from safetensors import safe_open

    reader = gguf.GGUFReader(packaged)
    writer = gguf.GGUFWriter(output, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", *OWN_FIELDS)):
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(field.name, field.contents(), kind, inner if kind != inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            target, weight = gguf_name(name), tensors.get_tensor(name)
            part = target.split(".")[-2]
            writer.add_tensor(target, permuted(weight, heads[part]) if part in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
