"""Commands that lead on from a result, as a shell takes them."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(
    name: str,
    folder: str | Path,
    *options: str,
    reference: str | None = None,
    tokens: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    provider: str = "cpu",
    threads: int = 0,
) -> str:
    """``pe-onnx NAME DIR OPTIONS...`` on a bundle as it was run: what a command takes by itself is left out.

    options: words that only this command has, such as ``--mode``. reference: as a command line names it. The others
    are ``check_parity``'s.
    """
    from pe_onnx.parity import DEFAULT_TOKENS

    given = {
        "--reference": reference,
        "--length": None if tokens == DEFAULT_TOKENS else tokens,
        "--tolerance": tolerance,
        "--seed": seed or None,
        "--provider": None if provider == "cpu" else provider,
        "--threads": threads or None,
    }
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return shlex.join(["pe-onnx", name, str(folder), *options, *words])
