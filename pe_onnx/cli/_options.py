"""Options and output that several commands share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from pe_onnx.errors import ConfigError

bundle_argument = click.argument("bundle", type=click.Path(), metavar="DIR")
provider_option = click.option(
    "--provider",
    default="cpu",
    metavar="cpu|cuda|cuda:N|auto",
    show_default=True,
    help="Execution provider; auto takes CUDA where it can be had. Or onnxruntime's own name of one.",
)
threads_option = click.option("--threads", default=0, metavar="N", help="Threads of one operator; 0 for one a core.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout in place of a table.")


def print_json(value: Any) -> None:
    """One document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def parse_encoding(spec: str, option: str = "--encoding ") -> tuple[str, dict[str, str]]:
    """``rope:theta=500000,interleaved=true`` to its name and parameters. Raises ConfigError."""
    name, _, rest = spec.partition(":")
    return name, parse_assignments(rest.split(",") if rest else [], f"{option}{name}")


def parse_assignments(items: Any, where: str) -> dict[str, str]:
    """``["a=1", "b=x"]`` to a dictionary. Raises ConfigError for what is no ``name=value``."""
    result = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{where}: {item!r} must be name=value")
        result[name.strip()] = value.strip()
    return result


def parse_counts(text: str, where: str) -> list[int]:
    """``128,1024`` to positive numbers. Raises ConfigError."""
    try:
        counts = [int(part) for part in text.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{where} = {text!r} must be positive numbers with commas between, as in 128,1024") from None
    return counts


def parse_share(text: str, where: str) -> float:
    """``10%`` or ``0.1`` to 0.1. Raises ConfigError for what is no share."""
    from pe_onnx import suite

    try:
        return suite.parse_share(text)
    except ValueError:
        raise ConfigError(f"{where} = {text!r} must be {suite.SHARE}") from None


def parse_bytes(text: str, where: str) -> int:
    """``512MB`` to 512,000,000; kB, MB, GB and, in powers of 1024, KiB, MiB, GiB. Raises ConfigError."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if found is None or found[2] not in units or not (count := int(float(found[1]) * units[found[2]])):
        raise ConfigError(f"{where} = {text!r} must be a size above 0, as in 512MB or 2GiB")
    return count


@contextmanager
def stages(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """A function to call as each of ``total`` stages begins: a bar on stderr, nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        begun = [0]

        def begin(stage: str) -> None:
            progress.update(task, description=f"{title}: {stage}", completed=begun[0])
            begun[0] += 1

        yield begin


def human_bytes(count: float) -> str:
    """``538 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
