"""optimum's ORTModelForCausalLM on packages, in an environment of its own: batches padded on the left, our tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import numpy as np
import pytest
from conftest import Bundles

import pe_onnx
from pe_onnx.packager import package

pytestmark = pytest.mark.slow

LENGTHS, NEW = (20, 7, 13), 24
GROUPED = {"tie_word_embeddings": False, "num_key_value_heads": 2, "head_dim": 24}
"""Heads of another size than C / H, which optimum would take them to have."""
CHAT = [{"role": "user", "content": "What is the capital of France?"}]

SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

asked, results = json.load(sys.stdin), {}
for name, run in asked.items():
    tokenizer = AutoTokenizer.from_pretrained(run["folder"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or "!"
    batch = tokenizer.pad({"input_ids": run["rows"]}, return_tensors="pt")
    for binding in (False, True):
        model = ORTModelForCausalLM.from_pretrained(run["folder"], use_io_binding=binding)
        made = model.generate(**batch, max_new_tokens=run["new"], do_sample=False, pad_token_id=tokenizer.pad_token_id)
        results[f"{name} {binding}"] = made[:, batch["input_ids"].shape[1]:].tolist()
    results[f"{name} texts"] = tokenizer(run["texts"])["input_ids"]
    if run["chat"]:
        results[f"{name} chat"] = tokenizer.apply_chat_template(run["chat"], tokenize=False, add_generation_prompt=True)
print(json.dumps(results))
"""
TEXTS = ["hello", " a  b\n\t", "Grüße 🙂 東京", "it's 1234 \r\n x"]


def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 256, length).tolist() for length in LENGTHS]


def test_the_same_tokens(
    optimum: Path, bundles: Bundles, smollm2_bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    made = {name: bundles(name, "portable", preset="tiny", config=GROUPED) for name in ("alibi", "learned", "rope")}
    made["smollm2"] = smollm2_bundles("portable")
    asked: dict[str, Any] = {}
    for name, bundle in made.items():
        package(bundle, "optimum", tmp_path / name)
        model = pe_onnx.load(bundle, verify=False)
        ours = name != "smollm2"
        prompts = (
            rows() if ours else [model.tokenizer.encode(model.tokenizer.apply_chat_template(CHAT), False), rows()[1]]
        )
        asked[name] = {
            "folder": str(tmp_path / name),
            "rows": prompts,
            "new": NEW,
            "texts": TEXTS,
            "chat": None if ours else CHAT,
        }
    found = json.loads(environments.run_python(optimum, SCRIPT, json.dumps(asked)))
    expected = {}
    for name, bundle in made.items():
        model = pe_onnx.load(bundle, verify=False)
        expected[name] = [result.tokens for result in model.generate(asked[name]["rows"], NEW)]
        for binding in (False, True):
            for row, want in zip(found[f"{name} {binding}"], expected[name], strict=True):
                assert row[: len(want)] == want, (name, binding)
                assert set(row[len(want) :]) <= {2}, "padding behind the end of a text"
        assert found[f"{name} texts"] == [model.tokenizer.encode(text) for text in TEXTS]
    model = pe_onnx.load(made["smollm2"], verify=False)
    assert found["smollm2 chat"] == model.tokenizer.apply_chat_template(CHAT)
    assert model.tokenizer.decode(expected["smollm2"][0]).startswith("The capital of France is Paris")
    assert expected["alibi"] != expected["rope"], "another encoding gives other tokens"
    assert expected["learned"] != expected["alibi"]
