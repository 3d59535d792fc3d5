"""A bundle's tokenizer and its special ids, as other libraries read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pe_onnx.bundle import Bundle
from pe_onnx.packages import checked_ids, copy_asset
from pe_onnx.tokenizer import load_tokenizer

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "spiece.model", "tokenizer.model"),
)
CONFIG = "tokenizer_config.json"
GENERIC_CLASS = "PreTrainedTokenizerFast"
"""The class of a tokenizer that is its tokenizer.json and nothing else, in every release of transformers."""


def write_tokenizer(bundle: Bundle, folder: Path, notes: list[str]) -> None:
    """Copy or make the tokenizer's files; where none can be had, a note says so."""
    kind = (bundle.manifest["tokenizer"] or {}).get("kind")
    if kind == "bytes":
        write_json(folder / "tokenizer.json", byte_tokenizer())
        write_json(folder / CONFIG, {"tokenizer_class": GENERIC_CLASS, "clean_up_tokenization_spaces": False})
        return
    found = [name for name in FILES if copy_asset(bundle, name, folder)]
    if "tokenizer.json" not in found:
        what = "none" if kind is None else f"a {kind!r}, which has no tokenizer.json"
        notes.append(f"no tokenizer: the bundle has {what}; give token ids")
    if CONFIG in found:
        write_json(folder / CONFIG, readable_config(bundle, read_json(folder / CONFIG)))


def readable_config(bundle: Bundle, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for readers that transformers 5 has left behind.

    transformers 4 knows no class TokenizersBackend and wants names to ``extra_special_tokens``; Transformers.js reads
    no chat_template.jinja.
    """
    made = dict(config)
    if made.get("tokenizer_class") in ("TokenizersBackend", None):
        made["tokenizer_class"] = GENERIC_CLASS
    if isinstance(extra := made.get("extra_special_tokens"), list):
        del made["extra_special_tokens"]
        made.setdefault("additional_special_tokens", extra)
    template = load_tokenizer(bundle.folder, bundle.manifest["tokenizer"]).chat_template
    return {**made, "chat_template": template} if template is not None else made


def byte_tokenizer() -> dict[str, Any]:
    """The ``tokenizers`` library's file of a tokenizer whose ids are the bytes of UTF-8.

    Byte-level BPE without merges. GPT-2's table (``bytes_to_unicode`` of its ``encoder.py``) writes a byte that is no
    printable Latin-1 character as one from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def special_ids(bundle: Bundle, eos: tuple[int, ...] | None) -> dict[str, int | list[int] | None]:
    """eos_token_id, bos_token_id and pad_token_id, those that were given before those of the bundle's configuration."""
    held = {**read_json(bundle.folder / "config.json"), **read_json(bundle.folder / "generation_config.json")}
    ids: dict[str, int | list[int] | None] = {}
    for name in ("bos_token_id", "pad_token_id"):
        value = held.get(name)
        ids[name] = value if isinstance(value, int) and 0 <= value < bundle.shape["vocab_size"] else None
    if eos is None:
        eos = tuple(sorted(load_tokenizer(bundle.folder, bundle.manifest["tokenizer"]).eos_token_ids))
    ends = checked_ids(eos, bundle)
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends or None, **ids}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
