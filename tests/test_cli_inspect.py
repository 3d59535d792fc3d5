"""`pe-onnx inspect`: a bundle's inputs, outputs and figures, in a table and in JSON."""

from __future__ import annotations

import json
import re

from conftest import Bundles, Cli


def test_inspect(cli: Cli, bundles: Bundles) -> None:
    bundle = bundles("rope", "portable", config={"num_key_value_heads": 2, "head_dim": 24})
    result = cli("inspect", bundle)
    assert (result.returncode, result.stderr) == (0, "")
    shapes = {
        "input_ids": "[batch_size, sequence_length]",
        "attention_mask": "[batch_size, total_sequence_length]",
        "position_ids": "[batch_size, sequence_length]",
        "past_key_values.{0..1}.key": "[batch_size, 2, past_sequence_length, 24]",
        "past_key_values.{0..1}.value": "[batch_size, 2, past_sequence_length, 24]",
        "logits": "[batch_size, sequence_length, 256]",
        "present.{0..1}.key": "[batch_size, 2, total_sequence_length, 24]",
        "present.{0..1}.value": "[batch_size, 2, total_sequence_length, 24]",
    }
    for name, shape in shapes.items():
        assert re.search(rf"^ {re.escape(name)} +{re.escape(shape)} *$", result.stdout, re.MULTILINE), name
    for text in ("portable", "rope", "theta", "10000.0", "default", "768 bytes per token", "pe_onnx::RotaryEmbedding"):
        assert text in result.stdout


def test_inspect_in_json(cli: Cli, bundles: Bundles) -> None:
    result = cli("inspect", bundles("rope"), "--json")
    assert result.stderr == ""
    shown = json.loads(result.stdout)
    assert shown["inputs"]["past_key_values.1.value"] == ["batch_size", 4, "past_sequence_length", 16]
    assert list(shown["inputs"])[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shown["outputs"]["logits"] == ["batch_size", 1, 256]
    assert shown["cache_bytes_per_token"] == 2 * 2 * 4 * 16 * 4
    assert shown["encoding"] == json.loads((bundles("rope") / "manifest.json").read_text())["encoding"]


def test_a_cache_that_holds_positions_on_cuda(cli: Cli, bundles: Bundles) -> None:
    shown = cli("inspect", bundles("alibi", dtype="fp16"))
    assert "cache on CUDA" in shown.stdout
    assert "768 bytes per token, positions in it: 2 layers x 2 x 4 heads x 24 channels" in " ".join(
        shown.stdout.split()
    )
    assert "cache on CUDA" not in cli("inspect", bundles("alibi")).stdout
