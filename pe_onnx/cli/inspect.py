"""Show what a bundle holds: encoding, tensors, operators, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pe_onnx.bundle import Bundle
    from pe_onnx.contract import CacheShape

from pe_onnx.cli._options import bundle_argument, human_bytes, json_option, print_json


@click.command()
@bundle_argument
@json_option
def command(bundle: str, as_json: bool) -> None:
    """Show what a bundle holds: its encoding and where each parameter came from, inputs and outputs, operators,
    custom functions, sizes and cache bytes per token."""
    from pe_onnx import contract
    from pe_onnx.bundle import CUDA, read_bundle

    read = read_bundle(bundle)
    m, shape = read.manifest, read.shape
    inputs, outputs = read.graphs[read.model.name]
    cache_bytes = read.cache_bytes_per_token
    if as_json:
        graphs = {name: {"inputs": given, "outputs": made} for name, (given, made) in read.graphs.items()}
        shown = {"inputs": inputs, "outputs": outputs, "graphs": graphs, "cache_bytes_per_token": cache_bytes}
        print_json({**m, **shown})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # shapes stand in brackets

    def table(title: str, *columns: str) -> Table:
        return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 1), header_style="dim")

    total = sum(entry["bytes"] for entry in m["files"].values())
    overview = table(str(read.folder), "", "")
    overview.columns[0].style = "bold"
    for name, value in {
        "source": _source(m["source"]),
        "target": f"{m['target']}: {contract.TARGETS[m['target']]}",
        "dtype": m["dtype"],
        "logits": m["logits"],
        "size": f"{human_bytes(total)}, weights {human_bytes(m['graph']['weight_bytes'])}",
        **({"prepared": left} if (left := _left(read)) else {}),
        "cache": f"{cache_bytes} bytes per token: " + _layers(read.caches),
        **({"cache on CUDA": _wide_cache(read, CUDA)} if read.positions_of(CUDA) else {}),
        **({"cross cache": _cross_cache(read)} if read.crossing else {}),
        "trained length": f"{shape['trained_length']} tokens" if shape["trained_length"] else "not known",
        "hard limit": f"{shape['max_length']} tokens" if shape["max_length"] else "none",
        "path dependent": "yes: frequencies switch with the length, cached keys keep theirs; prompts run whole"
        if read.path_dependent
        else "no",
        "proof": _proof(m["proof"]),
        "tokenizer": (m["tokenizer"] or {}).get("kind", "none"),
        "opsets": ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in m["graph"]["opsets"].items()),
        "functions": ", ".join(m["graph"]["functions"]) or "none",
        "tools": ", ".join(f"{tool} {version}" for tool, version in m["tools"].items()),
    }.items():
        overview.add_row(name, str(value))
    console.print(overview)

    encoding = table(f"encoding {m['encoding']['name']}", "parameter", "value", "origin")
    for name, entry in m["encoding"]["parameters"].items():
        encoding.add_row(name, _shown(entry["value"]), entry["origin"])
    for name, value in m["encoding"].get("ignored", {}).items():
        encoding.add_row(name, _shown(value), "ignored, as transformers ignores it")
    if not m["encoding"]["parameters"]:
        encoding.add_row("none", "", "")
    console.print(encoding)

    for file, (given, made) in read.graphs.items():
        tensors = table(f"inputs and outputs of {file}", "name", "shape")
        for name, dims in {**_folded(given), **_folded(made)}.items():
            tensors.add_row(name, "[" + ", ".join(str(d) for d in dims) + "]")
        console.print(tensors)

    operators = table("operators", "operator", "nodes")
    operators.columns[1].justify = "right"
    for name, count in m["graph"]["operators"].items():
        operators.add_row(name, str(count))
    console.print(operators)


def _layers(caches: Iterable[CacheShape]) -> str:
    return ", ".join(f"{n} layers x 2 x {K} heads x {D} channels" for (K, D), n in Counter(caches).items())


def _wide_cache(bundle: Bundle, graph: str) -> str:
    caches = bundle.caches_of(graph)
    return f"{bundle.bytes_per_token(caches)} bytes per token, positions in it: {_layers(caches)}"


def _cross_cache(bundle: Bundle) -> str:
    assert bundle.crossing is not None
    per_token = bundle.bytes_per_token(bundle.crossing.caches)
    return f"{per_token} bytes per source token: {_layers(bundle.crossing.caches)}"


def _proof(proof: dict[str, Any]) -> str:
    if not proof["verified"]:
        return "none: exported with --no-verify, or from a module that takes no test"
    return f"off by {proof['relative_error']:.1e} of the logits' spread on {proof['on']}"


def _source(source: dict[str, Any]) -> str:
    if source["kind"] == "encoding":
        c = source["config"]
        if c.get("weights") is not None:
            return f"our own decoder, {c['num_hidden_layers']} layers, weights trained with {c['weights']}"
        return f"our own decoder, preset {source['preset']}, {c['num_hidden_layers']} layers, seed {c['seed']}"
    if source["kind"] == "checkpoint":
        return f"{source['model_type']} checkpoint {source['path']}"
    return f"module {source['class']}"


def _shown(value: Any) -> str:
    """Lists by their runs: ``5 x sliding_attention, full_attention``; of long ones the beginning."""
    if not isinstance(value, list):
        return str(value)
    runs = [(item, len(list(run))) for item, run in groupby(value)]
    texts = [f"{length} x {item}" if length > 1 else str(item) for item, length in runs]
    more = f", ... ({len(value)})" if len(texts) > 12 else ""
    return ", ".join(texts[:12]) + more


def _folded(shapes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """One line for the layers of one shape: ``past_key_values.{0..7}.key``."""
    layers: dict[tuple[str, str, tuple[Any, ...]], list[int]] = {}
    folded = {}
    for name, dims in shapes.items():
        stem, _, rest = name.partition(".")
        if rest:
            number, _, kind = rest.partition(".")
            layers.setdefault((stem, kind, dims), []).append(int(number))
        else:
            folded[name] = dims
    for (stem, kind, dims), numbers in layers.items():
        folded[f"{stem}.{{{_spans(numbers)}}}.{kind}"] = dims
    return folded


def _spans(numbers: list[int]) -> str:
    """Ascending numbers as ``0..3,5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _left(bundle: Bundle) -> str:
    """What earlier starts left beside the bundle."""
    from pe_onnx.prepared import CHECKED, FOLDER, PARTIAL

    found = [p for p in (bundle.folder / FOLDER).glob("*") if p.name != CHECKED and not p.name.startswith(PARTIAL)]
    names = sorted({path.name.partition("-")[0] for path in found})
    return f"{', '.join(names)}: {human_bytes(sum(p.stat().st_size for p in found))}" if found else ""
