"""200 random mutations of valid configurations through the command line: exported with parity, or exit code 2 and one
line that names the key. Nothing in between."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import TRAINED, VOCAB
from mutations import BASES, Mutation, mutations
from transformers import AutoConfig

from pe_onnx.cli import main
from pe_onnx.errors import PeOnnxError
from pe_onnx.exporter import silenced
from pe_onnx.models import checkpoint

COUNT = 200
TOLERANCE = 5e-5
"""Of the logits' spread."""


def command_line(*args: object) -> tuple[int, str]:
    """Exit code and stderr of ``pe-onnx ARGS``, in this process."""
    stderr, before = io.StringIO(), sys.argv
    sys.argv = ["pe-onnx", *map(str, args)]
    try:
        with contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as done:
        return int(done.code or 0), stderr.getvalue()
    finally:
        sys.argv = before
    return 0, stderr.getvalue()


@torch.no_grad()
def error(bundle: Path, folder: Path) -> float:
    """Of the bundle on one row past the trained length, against transformers' own model of the same files."""
    with silenced():
        model = checkpoints.oracle(folder)
    limited = model.config.model_type == "gpt2"
    T = min(TRAINED, model.config.max_position_embeddings) if limited else 2 * TRAINED + 7
    ids = np.random.default_rng(5).integers(0, VOCAB, (1, T))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(T)[None]}
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"))
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]}
    have = session.run(["logits"], {**feeds, **past})[0]
    want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    return float(np.abs(have - want).max() / want.std())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: checkpoints.write(root / name, base.model_type, base.edit, **base.config) for name, base in BASES.items()
    }


@pytest.fixture(scope="module")
def of_base(folders: dict[str, Path]) -> Callable[[str], list[Mutation]]:
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}
    made = mutations(configs, COUNT)
    return lambda base: [mutation for mutation in made if mutation.base == base]


@pytest.mark.parametrize(
    ("base", "most"),
    [
        *((name, i % 2) for i, name in enumerate(BASES)),
        *(pytest.param(name, COUNT, marks=pytest.mark.slow) for name in BASES),
    ],
)
def test_a_mutation_is_exported_exactly_or_refused_by_name(
    base: str, most: int, of_base: Callable[[str], list[Mutation]], folders: dict[str, Path], tmp_path: Path
) -> None:
    """most: so many are exported, and every refusal is seen."""
    folder, exported = folders[base], set()
    for number, mutation in enumerate(of_base(base)):
        (folder / "config.json").write_text(json.dumps(mutation.config))
        output = tmp_path / str(number)
        try:
            with silenced():
                checkpoint.load(folder)
        except PeOnnxError:
            code, stderr = command_line("export", "--model", folder, "-o", output)
            assert (code, stderr.count("\n")) == (2, 1), (mutation.path, mutation.what, stderr)
            assert stderr.startswith("pe-onnx: ")
            assert any(name in stderr for name in mutation.names), (mutation.path, mutation.what, stderr)
            assert not output.exists()
            continue
        with silenced():
            resolved = AutoConfig.from_pretrained(folder).to_json_string()
        if resolved not in exported and len(exported) < most:  # else another mutation came to the same
            exported.add(resolved)
            code, stderr = command_line("export", "--model", folder, "-o", output, "--target", "portable")
            assert (code, stderr.count("\n")) == (0, 1), (mutation.path, mutation.what, stderr)
            assert error(output, folder) <= TOLERANCE, (mutation.path, mutation.what)


def test_the_mutations_are_of_every_kind(of_base: Callable[[str], list[Mutation]]) -> None:
    kinds = {mutation.what.split()[0] for base in BASES for mutation in of_base(base)}
    assert kinds == {"renamed", "out_of_range", "null", "other", "wrong_length", "unknown_type"}
    assert sum(len(of_base(base)) for base in BASES) == COUNT


def test_the_comparison_sees_a_changed_factor(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c", "llama", **BASES["llama_yarn"].config)
    assert command_line("export", "--model", folder, "-o", tmp_path / "b", "--target", "portable")[0] == 0
    assert error(tmp_path / "b", folder) <= TOLERANCE
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["factor"] = 5.0
    (folder / "config.json").write_text(json.dumps(config))
    assert error(tmp_path / "b", folder) > 100 * TOLERANCE
