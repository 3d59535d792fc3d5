"""A config.json whose model type other libraries know, with the sizes that they read from it.

optimum-onnx 0.1 and Transformers.js 4.3 look a decoder's cache up by its ``model_type``: optimum takes the heads from
``num_key_value_heads`` for a list of types only and the head size to be ``hidden_size / num_attention_heads``, both
know none of ours, and some types have rules of their own (OPT's positions). Nothing else of the configuration reaches
the graph, so that a Llama of the same cache may stand for any decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_onnx.bundle import Bundle
from pe_onnx.packages._texts import read_json, write_json

SOURCE = "source_config.json"
"""The bundle's own configuration, beside the one that stands in."""


def known_config(bundle: Bundle, ids: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The configuration, and whether it stands in for another. ids: eos_token_id and so on."""
    own = read_json(bundle.folder / "config.json")
    K, D = bundle.caches[0]
    heads = own.get("num_attention_heads")
    H = heads if isinstance(heads, int) and heads % K == 0 else K
    sizes = {
        "hidden_size": H * D,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": D,
        "num_hidden_layers": len(bundle.caches),
        "vocab_size": bundle.shape["vocab_size"],
    }
    if own.get("model_type") == "llama" and all(own.get(name) == size for name, size in sizes.items()):
        return {**own, **ids}, False
    length = bundle.max_length or bundle.trained_length
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **sizes,
        **({"max_position_embeddings": length} if length else {}),
        **ids,
        "use_cache": True,
    }, True


def write_source(bundle: Bundle, folder: Path, notes: list[str]) -> None:
    """The bundle's own configuration under another name, and a note on what stands for it."""
    own = read_json(bundle.folder / "config.json")
    if own:
        write_json(folder / SOURCE, own)
    notes.append(
        f"config.json says llama, of the graph's cache sizes, and stands for {own.get('model_type')!r} with encoding "
        f"{bundle.manifest['encoding']['name']!r}: the graph alone computes; {SOURCE} is the bundle's own"
    )
