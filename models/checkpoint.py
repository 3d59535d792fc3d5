"""Checkpoints from disk: a Hugging Face folder or a GGUF file, through transformers, or one line saying why not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pe_onnx.errors import CheckpointError
from pe_onnx.models.encoding_config import read_encoding

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
TOKENIZER_SOURCES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclasses.dataclass
class Loaded:
    """A checkpoint in float32, and what its files say."""

    model: PreTrainedModel
    encoding: str
    parameters: dict[str, dict[str, Any]]
    max_length: int | None
    config_json: dict[str, Any]
    generation_config_json: dict[str, Any]
    tokenizer: Mapping[str, Any] | None
    write_assets: Callable[[Path], None]


def load(path: Path) -> Loaded:
    """Raises CheckpointError for what is missing, truncated or not understood."""
    folder, gguf = locate(path)
    model = load_model(path)
    config = model.config.get_text_config(decoder=True)
    raw = None if gguf else json.loads((folder / "config.json").read_text("utf-8"))
    encoding, parameters, max_length = read_encoding(model, raw)
    config_json = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    config_json["architectures"] = [type(model).__name__]
    tokenizer, write_assets = _tokenizer(folder, gguf)
    return Loaded(
        model=model,
        encoding=encoding,
        parameters=parameters,
        max_length=max_length,
        config_json=config_json,
        generation_config_json=model.generation_config.to_dict(),
        tokenizer=tokenizer,
        write_assets=write_assets,
    )


def locate(path: Path) -> tuple[Path, str | None]:
    """The folder and, for a GGUF checkpoint, the file's name in it."""
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"checkpoint {path} must be a Hugging Face folder or a .gguf file")
        return path.parent, path.name
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return path, ggufs[0].name
        found = f"it holds {len(ggufs)} .gguf files; name one" if ggufs else "it has no config.json"
        raise CheckpointError(f"checkpoint {path} cannot be read: {found}")
    return path, None


def load_model(path: Path, attention: str = "eager") -> PreTrainedModel:
    """The whole causal LM in float32 on the CPU, every weight of the checkpoint accounted for."""
    folder, gguf = locate(path)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise CheckpointError(f"checkpoint {path}: {config.model_type!r} is an encoder-decoder; decoders only")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            trust_remote_code=False,  # or transformers asks on the terminal
            **options,
        )
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: the weights are truncated or damaged ({error})") from error
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {reason}") from error
    problems = {
        "missing": info["missing_keys"],
        "of another shape": [f"{name} {list(its)}, not {list(ours)}" for name, its, ours in info["mismatched_keys"]],
        "not read by the model": info["unexpected_keys"],
    }
    for what, keys in problems.items():
        if keys:
            first = sorted(str(key) for key in keys)[0]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"checkpoint {path}: weights {what}: {first}{more}")
    return model.eval()


def _tokenizer(folder: Path, gguf: str | None) -> tuple[Mapping[str, Any] | None, Callable[[Path], None]]:
    """The manifest's entry, and a function that writes the tokenizer's files into the bundle."""
    if gguf is None and (folder / "tokenizer.json").is_file():

        def copy(target: Path) -> None:
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)

        return {"kind": "tokenizer.json"}, copy
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {})
        )
        if getattr(tokenizer, "is_fast", False):
            return {"kind": "tokenizer.json"}, lambda target: tokenizer.save_pretrained(target) and None
        reason = "its tokenizer has no fast form"
    except Exception as error:  # none that transformers knows; a plain vocabulary may still do
        reason = str(error).strip().split("\n", 1)[0]
    if _plain_vocabulary(folder):

        def copy_vocabulary(target: Path) -> None:
            for name in ("vocab.json", "tokenizer_config.json"):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)

        return {"kind": "vocab"}, copy_vocabulary
    held = [name for name in TOKENIZER_SOURCES if (folder / name).is_file()]
    if held or gguf:
        raise CheckpointError(f"checkpoint {folder}: {gguf or held[0]} holds a tokenizer that cannot be read: {reason}")
    return None, lambda target: None


def _plain_vocabulary(folder: Path) -> bool:
    path = folder / "vocab.json"
    if not path.is_file() or (folder / "merges.txt").exists():
        return False
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: vocab.json is not JSON ({error})") from None
