"""Checkpoint families whose export is tested against transformers, logits by logits, on both targets."""

from __future__ import annotations

from typing import Final

FAMILIES: Final = {
    "llama": "rope",
    "qwen2": "rope",
    "qwen3": "rope",
    "gpt2": "learned",
}
"""transformers' ``model_type`` to the encoding it has by default. Others go through the same bridge, which refuses
what it cannot prove."""
