"""Every family saved by transformers and read back: no key of its own config.json is in the way, its encoding named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from variants import VARIANTS

import pe_onnx
from pe_onnx.models.bridge import from_checkpoint

ENCODINGS = {"falcon_alibi": "alibi", "falcon_alibi_old": "alibi", "granitemoehybrid": "rope"}
"""Of variants that have another than their family has by default."""
FAMILIES = json.loads((Path(pe_onnx.__file__).parent / "families.json").read_text())["families"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_is_read(name: str, tmp_path: Path) -> None:
    model_type, options = VARIANTS[name]
    model = tiny_models.build(model_type, **options)
    model.save_pretrained(tmp_path)
    exportable = from_checkpoint(tmp_path, "portable", False)
    assert exportable.encoding == (ENCODINGS.get(name) or FAMILIES[model_type]["encoding"])
    assert exportable.parameters
    assert exportable.path_dependent == any(kind in name for kind in ("dynamic", "longrope"))
