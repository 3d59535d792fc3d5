"""Checkpoints from disk: a Hugging Face folder or a GGUF file, through transformers, or one line saying why not."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from pe_onnx.errors import CheckpointError, did_you_mean
from pe_onnx.models import byte_tokenizer, config_keys, config_reads, gguf_once, rope_scaling, rope_types, weight_shapes
from pe_onnx.models.config_origin import Origins, blame, text_config
from pe_onnx.models.encoding_config import Encoding, read_encoding, refuse_misspelt, trained_length
from pe_onnx.models.observed import Observed, observe

SEQ2SEQ = ("t5", "mt5", "umt5")
"""Encoder-decoders that can be exported, by model_type."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
TEXT_PARTS = ("text_config", "decoder", "llm_config")
"""Parts of a config.json of several models that can be the text model's."""
TOKENIZER_SOURCES = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "tokenizer*")
"""Patterns of files of which transformers makes a tokenizer, where there is no tokenizer.json."""


@dataclasses.dataclass
class Loaded:
    """A checkpoint in float32, and what its files say."""

    model: PreTrainedModel
    encoding: Encoding
    trained_length: int | None
    config_json: dict[str, Any]
    generation_config_json: dict[str, Any]
    tokenizer: Mapping[str, Any] | None
    write_assets: Callable[[Path], None]


@gguf_once.parsed_once()
def load(path: Path, scaling: Mapping[str, Any] | None = None, follow: bool = False) -> Loaded:
    """scaling: a longer context, see rope_scaling.py. follow: let keys through that transformers ignores.

    Raises CheckpointError for what is missing, truncated or not understood.
    """
    folder, gguf = locate(path)
    where = "GGUF metadata" if gguf else "config.json"
    raw = _raw_config(folder, gguf)
    config, reach = resolve(path, scaling, raw)
    text = text_config(config)
    origins = Origins(config, raw, lambda plain: rope_scaling.apply(plain, scaling) if scaling else None)
    if not follow:
        refuse_misspelt(origins, where)
    with config_reads.recorded() as reads:
        config_reads.watch(text, reads)
        model = load_model(path, config=config)
        observed = _run_once(model)
    for module in model.modules():
        if isinstance(own := getattr(module, "config", None), PreTrainedConfig):
            config_reads.unwatch(own)
    encoding = read_encoding(origins, reads, observed, where, follow)
    config_reads.unwatch(text)
    config_json = {k: v for k, v in text.to_dict().items() if k != "quantization_config"}
    config_json["architectures"] = [type(model).__name__]
    tokenizer, write_assets = _tokenizer(folder, gguf)
    return Loaded(
        model=model,
        encoding=encoding,
        trained_length=reach or trained_length(text),
        config_json=config_json,
        generation_config_json={k: v for k, v in model.generation_config.to_dict().items() if v is not None},
        tokenizer=tokenizer,
        write_assets=write_assets,
    )


def _run_once(model: PreTrainedModel) -> Observed:
    """What a run shows, and so that what it reads of its configuration is seen."""
    if not model.config.is_encoder_decoder:
        return observe(model, "position_ids" in inspect.signature(model.forward).parameters)
    ids = torch.ones(1, 3, dtype=torch.int64)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=ids, decoder_input_ids=ids)
    except Exception as error:
        raise CheckpointError(f"{type(model).__name__} cannot be run: {_reason(error)}") from error
    return Observed([])


def resolve(
    path: Path, scaling: Mapping[str, Any] | None = None, raw: Mapping[str, Any] | None = None
) -> tuple[PreTrainedConfig, int | None]:
    """The configuration as transformers reads it, with the scaling, and the length that this is meant for.

    Raises CheckpointError for values that are out of range or contradict each other.
    """
    folder, gguf = locate(path)
    where = "GGUF metadata" if gguf else "config.json"
    raw = _raw_config(folder, gguf) if raw is None else raw
    model_type = raw.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"{where}: model_type = {config_keys.shown(model_type)} must be a name")
    is_known = model_type in CONFIG_MAPPING
    known = CONFIG_MAPPING[model_type] if is_known else PreTrainedConfig  # its get() knows nothing not yet imported
    for part in (raw, *(value for key, value in raw.items() if key in TEXT_PARTS and isinstance(value, Mapping))):
        config_keys.check(part, known, where)
        rope_types.check_raw(part, where)
    try:
        if gguf and is_known:
            config = known.from_dict(dict(raw))
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING)
        keys = ", ".join(blame(known, raw)) if is_known else f"model_type = {config_keys.shown(model_type)}{hint}"
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {where}: {keys}: {_reason(error)}") from error
    if config.is_encoder_decoder and config.model_type not in SEQ2SEQ:
        raise CheckpointError(
            f"checkpoint {path}: {config.model_type!r} is an encoder-decoder; of these {', '.join(SEQ2SEQ)} only"
        )
    text = text_config(config)
    rope_types.check(text, where)
    config_keys.check_shapes(text, where)
    return config, rope_scaling.apply(text, scaling) if scaling else None


def is_seq2seq(path: Path) -> bool:
    """Whether a checkpoint is an encoder-decoder that can be exported. Raises CheckpointError where it is none."""
    return _raw_config(*locate(path)).get("model_type") in SEQ2SEQ


def _raw_config(folder: Path, gguf: str | None) -> dict[str, Any]:
    """config.json as it stands, or what transformers reads of a GGUF file's metadata."""
    try:
        if gguf is None and not isinstance(json.loads((folder / "config.json").read_text("utf-8")), dict):
            raise CheckpointError(f"checkpoint {folder}: config.json must hold an object")
        return gguf_once.config_of(folder, gguf) if gguf else dict(PreTrainedConfig.get_config_dict(folder)[0])
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: config.json is not JSON ({error})") from None
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {folder / (gguf or 'config.json')} cannot be read: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """The whole of a message in one line; for a bare key, what it is."""
    text = " ".join(str(error).split())
    return f"{text} is missing" if isinstance(error, KeyError) else text or type(error).__name__


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


def load_model(path: Path, attention: str = "eager", config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The whole language model in float32 on the CPU, every weight of the checkpoint accounted for.

    config: in place of the checkpoint's own.
    """
    folder, gguf = locate(path)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if config is None:
        config, _ = resolve(path)
    try:
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            trust_remote_code=False,  # or transformers asks on the terminal
            **options,
        )
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: the weights are truncated or damaged ({error})") from error
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {_reason(error)}") from error
    if info["mismatched_keys"]:
        problem = weight_shapes.explain(config, list(info["mismatched_keys"]))
        raise CheckpointError(f"checkpoint {path}: weights of another shape: {problem}")
    unread = [key for key in info["unexpected_keys"] if not _is_old_mask(folder, str(key))]
    for what, keys in {"missing": info["missing_keys"], "not read by the model": unread}.items():
        if keys:
            first = sorted(str(key) for key in keys)[0]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"checkpoint {path}: weights {what}: {first}{more}")
    return model.eval()


OLD_MASK = re.compile(r"(^|\.)attn(\.attention)?\.(bias|masked_bias|causal_mask)$")
"""Buffers that GPT-2, GPT-J, GPT-Neo and CodeGen once saved beside their weights."""


def _is_old_mask(folder: Path, key: str) -> bool:
    """Whether a tensor of the checkpoint is a causal mask, or the number that stood for what is masked."""
    if not OLD_MASK.search(key):
        return False
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118
                x = tensors.get_tensor(key)
                full = torch.ones(x.shape[-2:]).tril().bool() if x.dim() == 4 else None
                return x.numel() == 1 or (full is not None and bool((x.bool() == full).all()))
    return True  # of a file that only PyTorch reads


def _tokenizer(folder: Path, gguf: str | None) -> tuple[Mapping[str, Any] | None, Callable[[Path], None]]:
    """The manifest's entry, and a function that writes the tokenizer's files into the bundle."""

    def copy(target: Path) -> None:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)

    if gguf is None and (folder / "tokenizer.json").is_file():
        return {"kind": "tokenizer.json"}, copy
    held = [path.name for pattern in TOKENIZER_SOURCES for path in sorted(folder.glob(pattern))]
    if gguf is None and not held:  # transformers would make an empty tokenizer of the family's kind
        return None, lambda target: None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {})
        )
        if getattr(tokenizer, "is_fast", False):
            return {"kind": "tokenizer.json"}, lambda target: tokenizer.save_pretrained(target) and None
        if isinstance(tokenizer, ByT5Tokenizer):

            def copy_and_convert(target: Path) -> None:
                copy(target)
                byte_tokenizer.convert(tokenizer).save(str(target / "tokenizer.json"))

            return {"kind": "tokenizer.json"}, copy_and_convert
        reason = "its tokenizer has no fast form"
    except Exception as error:  # none that transformers knows; a plain vocabulary may still do
        reason = _missing_reader(held) or str(error).strip().split("\n", 1)[0]
    if _plain_vocabulary(folder):

        def copy_vocabulary(target: Path) -> None:
            for name in ("vocab.json", "tokenizer_config.json"):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)

        return {"kind": "vocab"}, copy_vocabulary
    raise CheckpointError(f"checkpoint {folder}: {gguf or held[0]} holds a tokenizer that cannot be read: {reason}")


def _missing_reader(held: list[str]) -> str | None:
    """The package without which transformers takes a .model for a file of tiktoken."""
    if not any(name.endswith(".model") for name in held) or importlib.util.find_spec("sentencepiece"):
        return None
    return "transformers reads it with a package that is missing: pip install sentencepiece, and export again"


def _plain_vocabulary(folder: Path) -> bool:
    path = folder / "vocab.json"
    if not path.is_file() or (folder / "merges.txt").exists():
        return False
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: vocab.json is not JSON ({error})") from None
