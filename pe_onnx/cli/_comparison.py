"""What the commands that run a bundle beside PyTorch ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from pe_onnx.cli._options import provider_option, threads_option

REFERENCE = "PyTorch's side, where it is not where it was: a checkpoint, or package.module:attribute."

_OPTIONS = (
    click.option("--reference", metavar="MODEL", help=REFERENCE),
    click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Compare on this text; several make rows."),
    click.option("--length", type=int, metavar="N", help="Tokens of each random row. [160]"),
    click.option("--mode", "modes", multiple=True, metavar="NAME", help="Only this mode; may be given again."),
    click.option("--tolerance", type=float, metavar="X", help="Of the error relative to the spread, for the rule's."),
    click.option("--seed", default=0, metavar="N", help="Of the random rows."),
    provider_option,
    threads_option,
)


def comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def comparison(
    bundle: str, reference: str | None, prompts: Sequence[str], length: int | None, modes: Sequence[str], **others: Any
) -> dict[str, Any]:
    """The arguments of ``check_parity`` and ``bisect`` but for the folder, of what the options say.

    Raises what reading the bundle's tokenizer and ``load_reference`` raise.
    """
    from pe_onnx.parity import DEFAULT_TOKENS

    return {
        "reference": named(reference),
        "rows": _rows(bundle, prompts),
        "tokens": DEFAULT_TOKENS if length is None else length,
        "modes": modes or None,
        **others,
    }


def named(text: str | None) -> Any:
    """The reference that a name stands for; None for none."""
    if text is None:
        return None
    from pe_onnx.named_reference import load_reference

    return load_reference(text)


def _rows(bundle: str, prompts: Sequence[str]) -> list[list[int]] | None:
    """Token ids of texts, None for no texts."""
    if not prompts:
        return None
    from pe_onnx.bundle import read_bundle
    from pe_onnx.tokenizer import load_tokenizer

    read = read_bundle(bundle, verify=False)
    tokenizer = load_tokenizer(read.folder, read.manifest["tokenizer"])
    return [tokenizer.encode(prompt) for prompt in prompts]
