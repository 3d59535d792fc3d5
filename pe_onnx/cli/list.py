"""List encodings, checkpoint families, presets and targets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import click

from pe_onnx.cli._options import json_option, print_json

Families = dict[str, dict[str, Any]]


@click.command()
@click.option("--models", is_flag=True, help="The families of checkpoints: how each is exported, or why it is refused.")
@click.option("--encodings", is_flag=True, help="The encodings; with --models, the encoding of each family.")
@click.option("--markdown", is_flag=True, help="With --models: compact, as the README has it.")
@json_option
def command(models: bool, encodings: bool, markdown: bool, as_json: bool) -> None:
    """List encodings, checkpoint families, presets and targets.

    Families are those of transformers' ForCausalLM classes, as a sweep over tiny models found them.
    """
    if markdown and not models:
        raise click.UsageError("--markdown is for --models")
    known = families()
    if models:
        _show_families(known, encodings, markdown, as_json)
        return
    sections = _sections(known) if not encodings else {"--encoding": _encodings()}
    if as_json:
        names = {"--encoding": "encodings", "--preset": "presets", "--target": "targets"}
        result: dict[str, Any] = {names[title]: rows for title, rows in sections.items() if title in names}
        if not encodings:
            result["families"] = {name: row["encoding"] for name, row in _right(known).items()}
        print_json(result)
        return
    for title, rows in sections.items():
        _table(title, [(name, text) for name, text in rows.items()])


def families() -> Families:
    """``model_type`` to what the sweep over the installed transformers' classes found."""
    found: Families = _document()["families"]
    return found


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(files("pe_onnx").joinpath("families.json").read_text("utf-8"))
    return document


def _right(known: Families) -> Families:
    return {name: row for name, row in known.items() if row["status"] == "right"}


def _encodings() -> dict[str, str]:
    from pe_onnx import discovery

    return {name: discovery.summary("encodings", name) for name in discovery.names("encodings")}


def _sections(known: Families) -> dict[str, dict[str, str]]:
    from pe_onnx import contract
    from pe_onnx.config import PRESETS, DecoderConfig

    presets = {name: DecoderConfig.preset(name) for name in PRESETS}
    sizes = {
        name: f"{c.hidden_size} wide, {c.num_hidden_layers} layers, {c.num_attention_heads} heads"
        for name, c in presets.items()
    }
    count = f"{len(_right(known))} families of checkpoints: pe-onnx list --models"
    return {
        "--encoding": _encodings(),
        "--model": {"model_type": count},
        "--preset": sizes,
        "--target": dict(contract.TARGETS),
    }


def _show_families(known: Families, encodings: bool, markdown: bool, as_json: bool) -> None:
    if as_json:
        print_json(_document())
    elif markdown:
        click.echo("\n".join(_markdown(known)))
    else:
        rows = []
        for name, row in _right(known).items():
            shown = (row["encoding"],) if encodings else ()
            rows.append((name, *shown, row["route"], ", ".join(row["targets"])))
        _table(f"{len(rows)} families exported", rows)
        refused = [(name, row["reason"]) for name, row in known.items() if row["status"] == "refused"]
        _table(f"{len(refused)} families refused", refused)
        click.echo(_summary(known))


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 1))
    table.add_column(style="bold", no_wrap=True, min_width=12)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _summary(known: Families) -> str:
    counts: dict[str, int] = defaultdict(int)
    for row in known.values():
        counts[row["status"]] += 1
    one = sum(len(row["targets"]) == 1 for row in _right(known).values())
    partly = f" ({one} of them on one target only)" if one else ""
    return (
        f"Of {len(known)} families, those with a ForCausalLM class in transformers {_document()['transformers']} and "
        f"T5's encoder-decoders, "
        f"{counts['right']} are exported right{partly}, {counts['refused']} are refused with a reason, none is wrong; "
        f"of {counts['not built']} no tiny model could be built."
    )


def _markdown(known: Families) -> Iterable[str]:
    """Families by encoding, then those refused by reason."""
    yield _summary(known)
    yield ""
    yield "| encoding | through the bridge alone | with a file of its own |"
    yield "|---|---|---|"
    cells: dict[str, dict[bool, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, row in _right(known).items():
        only = f" ({row['targets'][0]} only)" if len(row["targets"]) == 1 else ""
        cells[row["encoding"]][row["route"] != "bridge"].append(f"{name}{only}")
    for encoding, by_route in sorted(cells.items()):
        yield f"| `{encoding}` | {', '.join(by_route[False])} | {', '.join(by_route[True])} |"
    yield ""
    yield "Refused: " + ", ".join(name for name, row in known.items() if row["status"] == "refused") + "."
    yield ""
    yield "Not tried: " + ", ".join(name for name, row in known.items() if row["status"] == "not built") + "."
