"""Every ``ForCausalLM`` class of the installed transformers, and T5's, through the bridge: right, or refused.

``python tests/sweep.py --write`` exports each family that a tiny model can be built of, on both targets, compares the
graphs in onnxruntime with transformers, and writes ``pe_onnx/families.json``, which ``pe-onnx list --models`` and the
README show. A family is ``right`` where every target that is not refused agrees; none may be wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import bridged
import exporter_tables
import t5_models
import tiny_models
import torch
import transformers
from click.testing import CliRunner
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import pe_onnx
from pe_onnx.cli.list import command as list_command
from pe_onnx.contract import TARGETS
from pe_onnx.errors import PeOnnxError
from pe_onnx.exporter import silenced
from pe_onnx.models import seq2seq
from pe_onnx.models.bridge import bridge, family, takes_positions
from pe_onnx.models.checkpoint import SEQ2SEQ
from pe_onnx.models.observed import Observed

CROSSED = {name: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[name] for name in SEQ2SEQ}
CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **CROSSED}

TOLERANCE = 5e-5
FILE = Path(__file__).parent.parent / "pe_onnx" / "families.json"
UNPADDED = {"llama4", "llama4_text"}
"""transformers 5.23 does not compute a padded row as the row alone; nor where it counts positions from the cache."""


def encoding_of(model: Any, observed: Observed) -> str:
    """The name of the encoding that a tiny model has: its family's word, then what its modules show."""
    named = getattr(family(model), "ENCODING", None)
    if named is not None:
        return named(model.config.get_text_config(decoder=True)) if callable(named) else named
    if any("inv_freq" in name for name, _ in model.named_buffers()):
        return "rope"
    if any("Sinusoidal" in type(module).__name__ for module in model.modules()):
        return "sinusoidal"
    return {"learned": "learned", "fixed": "sinusoidal", None: "none"}[observed.table]


def examine(model_type: str, exported: Collection[str] = tuple(TARGETS)) -> dict[str, Any]:
    """The row of a family. exported: targets on which it is exported; on others the bridge alone, which proves itself
    in PyTorch."""
    row: dict[str, Any] = {"class": CLASSES[model_type]}
    if model_type in CROSSED:
        return {**row, **examine_crossed(model_type, exported)}
    try:
        with silenced():
            model = tiny_models.build(model_type)
    except Exception as error:
        return {**row, "status": "not built", "reason": one_line(error)}
    right, reasons = {}, {}
    for target in TARGETS:
        try:
            with silenced():
                _, observed, _ = bridge(model, target, last_only=False)
            right[target] = encoding_of(model, observed)
            if target in exported:
                error = _error(model, model_type, target)
                if not error <= TOLERANCE:
                    return {**row, "status": "wrong", "reason": f"{target}: off by {error:.1e} of the logits' spread"}
        except PeOnnxError as error:
            right.pop(target, None)
            reasons[target] = one_line(error)
        except Exception as error:
            return {**row, "status": "wrong", "reason": f"{target}: {one_line(error)}"}
    if not right:
        return {**row, "status": "refused", "reason": reasons[next(iter(TARGETS))]}
    own = family(model)
    route = "bridge" if own is None else f"bridge + {own.__name__.removeprefix('pe_onnx.models.').replace('.', '/')}.py"
    row |= {"status": "right", "encoding": next(iter(right.values())), "route": route, "targets": list(right)}
    return {**row, "refused": reasons} if reasons else row


def examine_crossed(model_type: str, exported: Collection[str]) -> dict[str, Any]:
    """Of an encoder-decoder, with a decoder's parity check in the place of the families'."""
    model = t5_models.build(model_type)
    for target in TARGETS:
        with silenced():
            seq2seq.bridge(model, target, last_only=False)
        if target in exported:
            with tempfile.TemporaryDirectory() as folder, silenced():
                checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
                model.save_pretrained(checkpoint)
                pe_onnx.export(model=checkpoint, output=bundle, target=target)
                error = pe_onnx.check_parity(bundle, tokens=150).relative_error
            if not error <= TOLERANCE:
                return {"status": "wrong", "reason": f"{target}: off by {error:.1e} of the logits' spread"}
    own = family(model)
    route = f"bridge + families/{model_type}.py"
    return {"status": "right", "encoding": getattr(own, "ENCODING", None), "route": route, "targets": list(TARGETS)}


def _error(model: Any, model_type: str, target: str) -> float:
    exported = bridged.export(model, target)
    alone = model_type in UNPADDED or not takes_positions(model)
    first = exported.first
    references = bridged.references(model, exported.limit, position=lambda p: p + first, alone=alone)
    return max(bridged.error(exported, reference) for reference in references.values())


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PeOnnxError) else f"{type(error).__name__}: {text[:160]}"


def sweep(
    exported: Callable[[str], Collection[str]], jobs: int = 1, names: list[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Every family's row. exported: the targets on which a family is exported."""
    names = names or sorted(CLASSES)
    asked = [(name, tuple(exported(name))) for name in names]
    if jobs == 1:
        rows = map(_examine, asked)
    else:
        pool = multiprocessing.get_context("spawn").Pool(jobs, initializer=_fill_tables, maxtasksperchild=24)
        rows = pool.imap(_examine, asked)
    result = {}
    for name, row in zip(names, rows, strict=True):
        result[name] = row
        shown = f"{name:26} {row['status']:10} {row.get('encoding', '')} {row.get('reason', '')}"
        print(shown, file=sys.stderr, flush=True)
    return result


def _fill_tables() -> None:
    from torch.onnx._internal.exporter import _compat  # noqa: F401

    exporter_tables.keep()


def _examine(asked: tuple[str, tuple[str, ...]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    return examine(*asked)


def document(families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
    return {"transformers": transformers.__version__, "families": dict(sorted(families.items()))}


def write_readme() -> None:
    """The section between the markers becomes what the command prints."""
    command = "pe-onnx list --models --encodings --markdown"
    shown = CliRunner().invoke(list_command, command.split()[2:]).output
    path = FILE.parent.parent / "README.md"
    before, _, rest = path.read_text("utf-8").partition(f"<!-- {command} -->\n")
    _, _, after = rest.partition("<!-- end -->")
    path.write_text(f"{before}<!-- {command} -->\n{shown}<!-- end -->{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model_type; all by default")
    parser.add_argument("--fast", action="store_true", help="the bridge alone, no export")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}; with names, these rows of it")
    parser.add_argument("--readme", action="store_true", help="only write README.md's section from the file")
    options = parser.parse_args()
    if options.readme:
        write_readme()
        return
    targets = () if options.fast else tuple(TARGETS)
    found = sweep(lambda name: targets, 1 if options.fast else options.jobs, options.names)
    if options.write:
        known = json.loads(FILE.read_text())["families"] if options.names and FILE.exists() else {}
        FILE.write_text(json.dumps(document({**known, **found}), indent=1) + "\n")
    for status in ("right", "refused", "not built", "wrong"):
        print(f"{sum(row['status'] == status for row in found.values()):4} {status}")


if __name__ == "__main__":
    main()
