"""optimum's ORTModelForSeq2SeqLM on packages of our portable bundles, in an environment of its own: the tokens of
transformers 5.23 here, of padded sources, greedily and with beams, with its own buffers and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import environments
import pytest
import t5_models
import torch
from transformers import PreTrainedModel

import pe_onnx
from pe_onnx.packager import package

pytestmark = pytest.mark.slow

SOURCES = [[5, 6, 7, 8, 9, 40, 1], [11, 12, 1], [13, 1]]
NEW_TOKENS = 14
BEAMS = (1, 4)

SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM

asked = json.load(sys.stdin)
ids, results = torch.tensor(asked["ids"]), {}
for name, folder in asked["bundles"].items():
    for binding in (False, True):
        model = ORTModelForSeq2SeqLM.from_pretrained(folder, use_io_binding=binding)
        options = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": asked["new_tokens"]}
        own_size = model.config.hidden_size == model.config.num_attention_heads * model.config.d_kv
        if binding and not own_size:
            try:
                model.generate(**options)
            except RuntimeError as error:
                results[f"{name} refused"] = str(error)
            model.decoder.embed_size_per_head = model.config.d_kv
        for beams in asked["beams"]:
            results[f"{name} {binding} {beams}"] = model.generate(**options, num_beams=beams).tolist()
print(json.dumps(results))
"""

BUNDLES: dict[str, dict[str, Any]] = {
    "t5": {"untied": True},
    "flan_untied": {"d_model": 160, "vocab_size": 4000},
    "umt5": {"untied": True},
}
"""Variants of t5_models.py and what is changed; the second has its weights in a file of their own."""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """Name to transformers' model and a package of our bundle. A token that comes up ends the texts, some early."""
    made = {}
    for name, changes in BUNDLES.items():
        folder = tmp_path_factory.mktemp(name)
        model = t5_models.build(name, seed=5, **changes)
        model.generation_config.eos_token_id = [1, tokens(model, 1)[0][5]]
        model.save_pretrained(folder / "c")
        pe_onnx.export(model=folder / "c", output=folder / "b", target="portable", verify=False)
        package(folder / "b", "optimum", folder / "p")
        made[name] = (model, folder / "p")
    return made


def padded() -> torch.Tensor:
    longest = max(map(len, SOURCES))
    return torch.tensor([row + [0] * (longest - len(row)) for row in SOURCES])


def tokens(model: PreTrainedModel, beams: int) -> list[list[int]]:
    ids = padded()
    made = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW_TOKENS, num_beams=beams)
    return made.tolist()


def test_optimum_makes_the_tokens_of_transformers(
    optimum: Path, references: dict[str, tuple[PreTrainedModel, Path]]
) -> None:
    asked = {
        "ids": padded().tolist(),
        "new_tokens": NEW_TOKENS,
        "beams": BEAMS,
        "bundles": {name: str(folder) for name, (_, folder) in references.items()},
    }
    found = json.loads(environments.run_python(optimum, SCRIPT, json.dumps(asked)))
    ragged = []
    for name, (model, _) in references.items():
        wanted = {beams: tokens(model, beams) for beams in BEAMS}
        assert max(len({tuple(row) for row in rows}) for rows in wanted.values()) > 1, "the sources make no difference"
        ragged += [name for rows in wanted.values() if len({row.count(0) for row in rows}) > 1]
        for beams, rows in wanted.items():
            for binding in (False, True):
                assert found[f"{name} {binding} {beams}"] == rows, (name, binding, beams)
    assert ragged, "no row ends before the others"
    refused = [key for key in found if key.endswith("refused")]
    assert refused == ["flan_untied refused"], "optimum's own buffers have the head size C / H"
    for key in refused:
        assert "Got invalid dimensions for output: present.0.decoder.key" in found[key]


def test_the_script_is_run_by_another_transformers(optimum: Path) -> None:
    code = "import transformers, optimum.version; print(transformers.__version__, optimum.version.__version__)"
    assert environments.run_python(optimum, code).split() == ["4.57.6", "2.1.0"]
    assert str(environments.interpreter(optimum)) != sys.executable
