"""onnxruntime-genai 0.18: genai_config.json beside the bundle's files, model type ``decoder``.

A bundle of target ``ort`` runs in place, past and present in one buffer; of target ``portable`` with a cache that
grows. Rows of a batch are padded on the right, which genai does by itself. It runs a prompt in one piece, as our
runtime does where an encoding depends on it, unless ``chunk_size`` is set. It has no text without an end: where no id
is named, 0 ends one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_onnx.bundle import MODEL
from pe_onnx.errors import ConfigError
from pe_onnx.packages import Package, need_decoder, need_numbers, need_whole_cache, one_cache_shape
from pe_onnx.packages._texts import read_json, special_ids, write_json, write_tokenizer

DEFAULT_CONTEXT = 2048
"""Where neither the encoding nor the training says how long a text may be."""


class Genai(Package):
    """For ``onnxruntime_genai.Model(folder)``."""

    accepts = ("eos", "context")

    def check(self) -> None:
        bundle = self.bundle
        need_decoder(bundle, "genai", "export it with --target portable and make a package for optimum")
        need_whole_cache(bundle, "genai")
        need_numbers(bundle, "genai", ("float32", "float16", "int8"))
        one_cache_shape(bundle, "genai")
        limit, asked = bundle.max_length, self.options.context
        if asked is not None and (asked < 2 or asked > (limit or asked)):
            raise ConfigError(f"context = {asked}: accepted are 2..{limit or 'any'} tokens, as the encoding takes them")
        if special_ids(bundle, self.options.eos)["eos_token_id"] is None:
            raise ConfigError(
                f"genai ends a text at some token id, and {bundle.folder} names none: give --eos ID, one that does not "
                "come up, such as 0 where ids are bytes"
            )

    def write(self, folder: Path) -> None:
        self.place_graph(MODEL, folder / MODEL)
        write_tokenizer(self.bundle, folder, self.notes)
        write_json(folder / "genai_config.json", self.config())

    def config(self) -> dict[str, Any]:
        """genai_config.json."""
        bundle, held = self.bundle, read_json(self.bundle.folder / "config.json")
        K, D = one_cache_shape(bundle, "genai")
        ids = special_ids(bundle, self.options.eos)
        eos = ids["eos_token_id"]
        first = eos[0] if isinstance(eos, list) else eos
        heads = held.get("num_attention_heads")
        length = self.options.context or bundle.max_length or bundle.trained_length or DEFAULT_CONTEXT
        model = {
            "type": "decoder",
            "vocab_size": bundle.shape["vocab_size"],
            "context_length": length,
            "bos_token_id": first if ids["bos_token_id"] is None else ids["bos_token_id"],
            "eos_token_id": eos,
            "pad_token_id": first if ids["pad_token_id"] is None else ids["pad_token_id"],
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": MODEL,
                "head_size": D,
                "hidden_size": held.get("hidden_size", K * D),
                "num_attention_heads": heads if isinstance(heads, int) else K,
                "num_key_value_heads": K,
                "num_hidden_layers": len(bundle.caches),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        }
        search = {
            "max_length": length,
            "do_sample": False,
            "past_present_share_buffer": bundle.target == "ort",
        }
        return {"model": model, "search": search}

    def loading(self, folder: Path) -> str:
        return f"python -c \"import onnxruntime_genai as og; model = og.Model('{folder}')\""
