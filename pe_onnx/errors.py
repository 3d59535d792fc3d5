"""The errors that pe-onnx raises on purpose; the command line prints each in one line on stderr.

Every message says what was wrong (``name = value``), what is accepted and the next step. ``exit_code`` is what the
command line exits with: 2 for wrong usage or input, 1 for a check that failed or a bundle that is broken.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class PeOnnxError(Exception):
    """Base of all errors a user can cause."""

    exit_code = 2


class ConfigError(PeOnnxError):
    """A configuration, parameter or option that is unknown, out of range or contradictory."""


class CheckpointError(PeOnnxError):
    """A checkpoint that is missing, truncated, or of a kind that cannot be exported exactly."""


class InputError(PeOnnxError):
    """Tokens or a prompt that the model cannot take (token id out of range, longer than the learned table)."""


class MissingDependencyError(PeOnnxError, ImportError):
    """A package of an extra that is not installed."""


class ProviderError(PeOnnxError):
    """An execution provider that was asked for and cannot be had."""


class BundleError(PeOnnxError):
    """A bundle that is missing, incomplete or corrupted."""

    exit_code = 1


class CacheFileError(PeOnnxError):
    """A file of a saved cache that is missing, corrupted or of another bundle, or that cannot be written."""

    exit_code = 1


class ExportError(PeOnnxError):
    """An export that could not be finished, or whose result does not follow the graph contract."""

    exit_code = 1


class ParityError(PeOnnxError):
    """A bundle that does not compute what PyTorch computes."""

    exit_code = 1


class CheckError(PeOnnxError):
    """Bundles that did not pass their check."""

    exit_code = 1


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Around imports: a package that is missing becomes one line that names the extra it belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed, and {what} needs it: pip install {extra}"
        ) from error


def first_line(error: BaseException) -> str:
    """Of another package's message, whose further lines are for its own developers."""
    return str(error).strip().split("\n", 1)[0]


def system_reason(error: Exception) -> str:
    """The system's words for an OSError, without path and number; NumPy's of a full disk has none."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"no room for it ({error})" if "requested and" in str(error) else str(error)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'rope'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
