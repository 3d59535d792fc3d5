"""Checkpoints of transformers through the bridge, against transformers' own model and its own cached decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import TRAINED, VOCAB
from safetensors.torch import load_file
from transformers import DynamicCache

import pe_onnx
from pe_onnx.bundle import read_bundle
from pe_onnx.kv_cache import make_cache
from pe_onnx.parity import check_parity
from pe_onnx.passes.fused_projections import JOIN
from pe_onnx.session import Session

TOLERANCE = 2e-5
TARGETS = ("ort", "portable")
WINDOW = 30  # more than the 24 tokens on which the bridge proves itself


def old_theta(values: dict[str, Any]) -> None:
    del values["rope_parameters"]
    values["rope_theta"] = 500.0


def old_linear(values: dict[str, Any]) -> None:
    old_theta(values)
    values["rope_scaling"] = {"type": "linear", "factor": 4.0}


def rope(kind: str, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **others}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
QWEN2 = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Variant:
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    norms: int = 5
    """Root-mean-square norms of its two layers, with the sum before them or without."""


VARIANTS = {
    "llama": Variant("llama", rope("default"), {"edit": old_theta}),
    "llama_linear": Variant("llama", rope("linear", factor=4.0), {"edit": old_linear}),
    "llama_llama3": Variant("llama", rope("llama3", **LLAMA3)),
    "llama_yarn": Variant("llama", rope("yarn", **YARN)),
    "llama_yarn_options": Variant("llama", rope("yarn", **YARN, attention_factor=1.4, truncate=False)),
    "qwen2": Variant("qwen2", QWEN2),
    "qwen2_window": Variant("qwen2", {**QWEN2, **WINDOWED}),
    "qwen3": Variant("qwen3", {"hidden_size": 48, "head_dim": 32}, norms=9),
    "gpt2": Variant("gpt2", norms=0),
    "gpt2_inverse": Variant("gpt2", {"scale_attn_by_inverse_layer_idx": True}, norms=0),
    "gpt2_unscaled": Variant("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}, {"gain": 0.7}, 0),
}
FAST = {
    "ort": {"llama", "llama_yarn", "qwen2_window", "gpt2_inverse"},
    "portable": {"llama", "llama_linear", "qwen3", "gpt2_unscaled"},
}
"""The others are a sweep."""


def swept(target: str, variants: Iterable[str] = VARIANTS) -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST[target] else pytest.mark.slow) for name in variants]


CASES = [pytest.param(*case.values, target, marks=case.marks) for target in TARGETS for case in swept(target)]
Folders = Callable[[str], Path]
Exported = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders("llama")``: the checkpoint, written at the first call."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if not (root / name).exists():
            variant = VARIANTS[name]
            checkpoints.write(root / name, variant.model_type, **variant.options, **variant.config)
        return root / name

    return get


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, folders: Folders) -> Exported:
    """``exported("llama", "ort")``: the bundle, exported at the first call."""
    root = tmp_path_factory.mktemp("bundles")

    def get(name: str, target: str) -> Path:
        output = root / f"{name}-{target}"
        if not output.exists():
            pe_onnx.export(model=folders(name), output=output, target=target)
        return output

    return get


@pytest.mark.parametrize(("name", "target"), CASES)
def test_parity_in_every_mode(name: str, target: str, exported: Exported) -> None:
    report = check_parity(exported(name, target), tokens=80, tolerance=TOLERANCE)
    wrong = {mode.mode: (mode.relative_error, mode.first_difference) for mode in report.modes if not mode.passed}
    assert not wrong
    assert len(report.modes) == (8 if target == "portable" else 5)


@pytest.mark.parametrize("name", swept("portable"))
def test_cached_decode_with_left_padding_is_that_of_transformers(
    name: str, folders: Folders, exported: Exported
) -> None:
    """Plain onnxruntime, token by token and in one chunk, past the trained length where no table ends there."""
    model = checkpoints.oracle(folders(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(exported(name, "portable") / "model.onnx"), options)
    past_inputs = session.get_inputs()[3:]
    total = TRAINED if name.startswith("gpt2") else TRAINED + 20
    lengths, prompt = (total, total - 7, total - 36), 37  # the last row begins with a single token
    ids = np.random.default_rng(3).integers(3, VOCAB, (3, total))
    mask = (np.arange(total) >= total - np.array(lengths)[:, None]).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {i.name: np.zeros((3, i.shape[1], 0, i.shape[3]), np.float32) for i in past_inputs}
    cache = DynamicCache(config=model.config)
    wants, haves = [], []
    begin = 0
    for end in (prompt, *range(prompt + 1, prompt + 9), total - 24, *range(total - 23, total + 1)):
        feed = {
            "input_ids": ids[:, begin:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, begin:end],
        }
        logits, *present = session.run(None, {**feed, **past})
        past = dict(zip(past, present, strict=True))
        with torch.no_grad():
            tensors = {key: torch.from_numpy(value) for key, value in feed.items()}
            output = model(**tensors, past_key_values=cache, use_cache=True)
        valid = mask[:, begin:end] == 1
        haves.append(logits[valid])
        wants.append(output.logits.numpy()[valid])
        begin = end
    want, have = np.concatenate(wants), np.concatenate(haves)
    assert want.shape == (sum(lengths), VOCAB)
    assert np.isfinite(have).all()
    assert np.abs(have - want).max() / want.std() <= TOLERANCE


@pytest.mark.parametrize("name", swept("ort", [name for name in VARIANTS if not name.startswith("gpt2")]))
def test_in_place_cache_past_the_trained_length(name: str, folders: Folders, exported: Exported) -> None:
    total, prompt = TRAINED + 40, TRAINED - 6
    ids = np.random.default_rng(4).integers(3, VOCAB, total)
    with torch.no_grad():
        want = checkpoints.oracle(folders(name))(torch.from_numpy(ids[None])).logits[0].numpy()
    cache = make_cache(Session(read_bundle(exported(name, "ort"))), 1, total)
    have = [cache.prefill([ids[:prompt].tolist()])[0].copy()]
    have += [cache.decode([token])[0].copy() for token in ids[prompt:]]
    error = np.abs(np.stack(have) - want[prompt - 1 :]).max() / want.std()
    assert error <= TOLERANCE


@pytest.mark.parametrize("target", ["ort", pytest.param("portable", marks=pytest.mark.slow)])
def test_check_parity_of_a_short_trained_length(target: str, tmp_path: Path) -> None:
    """Default parity takes 160 tokens; RoPE goes on past a trained length of 32."""
    checkpoints.write(tmp_path / "c", "llama", num_hidden_layers=1, max_position_embeddings=32)
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target=target)
    assert check_parity(tmp_path / "b", tolerance=TOLERANCE).passed


@pytest.mark.parametrize(("name", "target"), CASES)
def test_exported_graph(name: str, target: str, exported: Exported) -> None:
    variant = VARIANTS[name]
    model = onnx.load(exported(name, target) / "model.onnx")
    count = Counter(node.op_type for node in model.graph.node)
    K, D = {"llama": (2, 16), "qwen2": (1, 32), "qwen3": (2, 32), "gpt2": (4, 16)}[variant.model_type]
    attention, other = ("CachedAttention", "MaskedAttention")[:: 1 if target == "ort" else -1]
    assert (count[attention], count[other]) == (2, 0)
    assert count["RotaryEmbedding"] == (0 if variant.model_type == "gpt2" else 4)  # queries and keys of two layers
    assert {n.domain for n in model.graph.node if n.op_type == "RotaryEmbedding"} <= {"pe_onnx"}
    assert count["RMSNormalization"] + count["SkipSimplifiedLayerNormalization"] == variant.norms
    if variant.model_type != "gpt2":  # cos and sin come from the positions: nothing as long as the trained length
        single = [tensor for tensor in model.graph.initializer if JOIN not in tensor.name]
        assert all(max(tensor.dims, default=0) < TRAINED for tensor in single)

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    caches = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    inputs = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{c}": ["batch_size", K, "past_sequence_length", D] for c in caches},
    }
    outputs = {
        "logits": ["batch_size", "sequence_length" if target == "portable" else 1, VOCAB],
        **{f"present.{c}": ["batch_size", K, "total_sequence_length", D] for c in caches},
    }
    assert shapes(model.graph.input) == inputs
    assert list(shapes(model.graph.input)) == list(inputs)
    assert shapes(model.graph.output) == outputs
    assert list(shapes(model.graph.output)) == list(outputs)


TWINS = [
    ("llama", "llama_linear"),
    ("llama", "llama_llama3"),
    ("llama", "llama_yarn"),
    ("llama_yarn", "llama_yarn_options"),
    ("qwen2_window", "qwen2"),
    ("gpt2_inverse", "gpt2"),
]
"""A bundle of the altered configuration, and the original whose reference it must fail. Weights are the same."""


@pytest.mark.parametrize("target", ["ort", pytest.param("portable", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("altered", "original"), TWINS)
def test_broken_twin_fails(altered: str, original: str, target: str, folders: Folders, exported: Exported) -> None:
    assert_same_weights(folders(altered), folders(original))
    report = check_parity(exported(altered, target), folders(original), tokens=80, modes=["steps"])
    assert not report.passed
    assert report.relative_error > 0.1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_weights(a: Path, b: Path) -> None:
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())


def test_other_theta_fails(tmp_path: Path, folders: Folders, exported: Exported) -> None:
    changed = checkpoints.write(tmp_path / "c", "llama", rope_parameters={"rope_type": "default", "rope_theta": 650.0})
    assert_same_weights(changed, folders("llama"))
    assert not check_parity(exported("llama", "ort"), changed, tokens=80, modes=["steps"]).passed


def test_permuted_queries_and_keys_fail(tmp_path: Path, folders: Folders, exported: Exported) -> None:
    """Rows in interleaved order, as a GGUF file holds them; the permutation undone passes."""
    for kind in ("permuted", "restored"):
        state = weights(folders("llama"))
        for name in state:
            if "q_proj" in name or "k_proj" in name:
                rows = torch.arange(state[name].shape[0]).view(-1, 2, 8)  # 16 channels a head
                mixed = rows.transpose(1, 2).reshape(-1)
                order = mixed if kind == "permuted" else mixed[torch.argsort(mixed)]
                state[name] = state[name][order].contiguous()
        model = checkpoints.oracle(folders("llama"))
        model.load_state_dict(state)
        model.save_pretrained(tmp_path / kind)
    bundle = exported("llama", "ort")
    assert check_parity(bundle, tmp_path / "restored", tokens=80, modes=["steps"]).passed
    assert check_parity(bundle, tmp_path / "permuted", tokens=80, modes=["steps"]).relative_error > 0.1


@pytest.mark.slow
def test_half_precision_keeps_its_tolerance_at_any_length(tmp_path: Path) -> None:
    """1,500 tokens: frequencies rounded to float16 are off by a large angle there, and by none at 64."""
    checkpoints.write(tmp_path / "c", "llama", max_position_embeddings=2048)
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target="portable", dtype="fp16")
    assert check_parity(tmp_path / "b", tokens=80).passed
    report = check_parity(tmp_path / "b", tokens=1500, modes=["whole"])
    half = checkpoints.oracle(tmp_path / "c", "sdpa", dtype=torch.float16)
    single = checkpoints.oracle(tmp_path / "c", "sdpa")
    ids = torch.randint(3, VOCAB, (1, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = single(ids).logits
        theirs = float((half(ids).logits.float() - want).abs().max() / want.std())
    assert theirs <= report.tolerance.error  # transformers in float16 keeps it
    assert report.passed, (report.relative_error, theirs)


def test_reference_of_a_model_without_sdpa(tmp_path: Path) -> None:
    """Gemma-2 exports; parity must find a reference for it by itself."""
    folder = checkpoints.write(tmp_path / "c", "gemma2", query_pre_attn_scalar=16)
    pe_onnx.export(model=folder, output=tmp_path / "b")
    assert check_parity(tmp_path / "b", tokens=80, tolerance=TOLERANCE).passed
