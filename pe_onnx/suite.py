"""A suite of bundles to check, as ``pe-onnx.toml`` or ``[tool.pe-onnx.check]`` of a pyproject.toml holds it.

Paths in it are relative to its folder. Whatever it says, the command line can override::

    [check]
    bundles = ["bundles/*", { path = "smollm2", reference = "checkpoints/smollm2", budgets = { decode_ms = 40 } }]
    providers = ["cpu"]
    modes = ["whole", "steps", "greedy"]
    tolerance = 1e-4
    max-kl = 0.05
    baseline = "baseline.json"
    max-regression = "10%"
    budgets = { load_s = 2, prefill_tokens_per_s = 500 }
"""

from __future__ import annotations

import dataclasses
import glob
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pe_onnx.errors import ConfigError, did_you_mean
from pe_onnx.named_reference import is_import

SUITE = "pe-onnx.toml"
PYPROJECT = "pyproject.toml"


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Limits on a bundle's figures, whatever they were before; None where there is none."""

    decode_ms: float | None = None
    """Milliseconds a decode step may take, at every depth that is measured."""
    first_token_ms: float | None = None
    """Milliseconds from a prompt to its first new token."""
    load_s: float | None = None
    """Seconds from the folder to an open session, the median of up to three processes."""
    peak_memory_mb: float | None = None
    """Memory of the process at its highest, in units of 1,000,000 bytes."""
    cache_bytes_per_token: float | None = None
    """Bytes of keys and values that a token takes in all layers."""
    prefill_tokens_per_s: float | None = None
    """Tokens of a prompt a second: the only one that is a minimum."""

    def over(self, others: Budgets) -> Budgets:
        """These, and others where these say nothing."""
        own = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(others, **own)

    def given(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


NO_BUDGETS = Budgets()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A bundle to check, or a pattern of such, and what is asked of it alone; None where it follows the rest."""

    path: str | Path
    reference: Any = None
    """A checkpoint's path, ``module:attribute``, or what ``check_parity`` takes."""
    tolerance: float | None = None
    modes: tuple[str, ...] | None = None
    budgets: Budgets = NO_BUDGETS
    max_kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a suite file says; None where it says nothing."""

    file: Path
    bundles: tuple[Entry, ...]
    providers: tuple[str, ...] | None = None
    reference: str | None = None
    modes: tuple[str, ...] | None = None
    tolerance: float | None = None
    baseline: Path | None = None
    max_regression: float | None = None
    budgets: Budgets = NO_BUDGETS
    length: int | None = None
    seed: int | None = None
    threads: int | None = None
    max_kl: float | None = None
    text: Path | None = None
    quality: bool | None = None
    latency: bool | None = None
    matrix: bool | None = None


class _Kind(NamedTuple):
    """What a key takes: the words for it, and its reading, which raises ValueError for anything else."""

    accepted: str
    read: Callable[[Any], Any]


def parse_share(value: Any) -> float:
    """``"10%"``, ``"0.1"`` or 0.1 to 0.1. Raises ValueError for what is no share above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    text = str(value).strip()
    share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < share <= 1:
        raise ValueError(value)
    return share


SHARE = "a share above 0 and up to 1, such as 10% or 0.1"


def find_suite(folder: Path) -> Path | None:
    """The suite file of a folder: its pe-onnx.toml, or its pyproject.toml where that has a [tool.pe-onnx] table."""
    if (folder / SUITE).is_file():
        return folder / SUITE
    project = folder / PYPROJECT
    return project if project.is_file() and _inside(_tables(project), "tool", "pe-onnx") else None


def read_suite(file: str | Path) -> Suite:
    """Read and check a suite file. Raises ConfigError that names the file, the key and what it takes."""
    file = Path(file)
    tables: Mapping[str, Any] = _tables(file)
    prefix = ""
    if file.name == PYPROJECT:
        tables, prefix = _inside(tables, "tool", "pe-onnx"), "tool.pe-onnx."
    _only_known(tables, ("check",), f"{file}, [{prefix.rstrip('.')}]" if prefix else str(file))
    if "check" not in tables:
        raise ConfigError(f"{file} has no table [{prefix}check]; it holds the bundles to check")
    where = f"{file}, [{prefix}check]"
    values = _read(tables["check"], _kinds(file.parent, where), where)
    if "bundles" not in values:
        raise ConfigError(f'{where} has no bundles; list folders or patterns: bundles = ["bundles/*"]')
    return Suite(file=file, **values)


def expand(patterns: Iterable[Entry], base: Path = Path(), may_be_empty: bool = False) -> list[Entry]:
    """Each folder once, those of a pattern sorted; what an entry says goes to all that it matches.

    A later entry for a folder that an earlier one named takes its place, so that ``bundles/*`` can be followed by an
    exception. Raises ConfigError for a pattern that matches no folder, unless it may be empty.
    """
    found: dict[Path, Entry] = {}
    for entry in patterns:
        text = str(entry.path)
        literal = base / text
        if literal.exists() or not glob.has_magic(text):
            matches = [literal]
        else:
            matches = sorted(base / name for name in glob.glob(text, root_dir=base, recursive=True))
            matches = [path for path in matches if path.is_dir()]
            if "**" in text:  # it names the folders within bundles too
                matches = [path for path in matches if (path / "manifest.json").is_file()]
            if not matches and not may_be_empty:
                raise ConfigError(f"{literal} matches no folder; name bundles that `pe-onnx export -o DIR` made")
        for path in matches:
            found[path.resolve()] = dataclasses.replace(entry, path=path)
    return list(found.values())


def _tables(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"suite {file} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"suite {file} is no valid TOML: {error}") from None


def _inside(tables: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The table at a path; an empty one where there is none."""
    for key in path:
        inner = tables.get(key)
        tables = inner if isinstance(inner, Mapping) else {}
    return tables


def _only_known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)} (accepted: {', '.join(known)})")


def _read(values: Any, kinds: Mapping[str, _Kind], where: str) -> dict[str, Any]:
    """A table's values by field name."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table with keys among {', '.join(kinds)}")
    _only_known(values, kinds, where)
    result = {}
    for key, value in values.items():
        try:
            result[key.replace("-", "_")] = kinds[key].read(value)
        except (ValueError, TypeError):
            raise ConfigError(f"{where}: {key} = {value!r} must be {kinds[key].accepted}") from None
    return result


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(value)
    return value


def _positive(value: Any) -> float:
    if not _number(value) > 0:
        raise ValueError(value)
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(value)
    return tuple(_word(item) for item in value)


def _kinds(base: Path, where: str) -> dict[str, _Kind]:
    """The keys of [check], in the order in which they are documented."""

    def reference(value: Any) -> str:
        return _word(value) if is_import(_word(value), base) else str(base / value)

    def budgets(value: Any, of: str = "budgets") -> Budgets:
        limit = _Kind("a number above 0", _positive)
        names = [field.name for field in dataclasses.fields(Budgets)]
        return Budgets(**_read(value, dict.fromkeys(names, limit), f"{where}, {of}"))

    def bundles(value: Any) -> tuple[Entry, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(value)
        entries = []
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                entries.append(Entry(_word(item)))
                continue
            of = f"bundles[{i}]"
            limits = _Kind("a table", partial(budgets, of=f"{of}.budgets"))
            values = _read(item, {"path": path, **each, "budgets": limits}, f"{where}, {of}")
            if "path" not in values:
                raise ConfigError(f"{where}, {of} has no path")
            entries.append(Entry(**values))
        return tuple(entries)

    path = _Kind("a folder or a pattern", _word)
    each = {
        "reference": _Kind("a checkpoint's path or module:attribute", reference),
        "modes": _Kind("a list of parity modes", _words),
        "tolerance": _Kind("a number, at least 0", _number),
        "max-kl": _Kind("a number of nats, at least 0", _number),
    }
    return {
        "bundles": _Kind("a list of folders, patterns or tables with a path", bundles),
        "providers": _Kind("a list of providers: cpu, cuda, auto", _words),
        **each,
        "baseline": _Kind("a file", lambda value: base / _word(value)),
        "max-regression": _Kind(SHARE, parse_share),
        "budgets": _Kind("a table", budgets),
        "length": _Kind("a number of tokens, at least 2", lambda value: _count(_count(value) - 2) + 2),
        "seed": _Kind("a whole number, at least 0", _count),
        "threads": _Kind("a number of threads, 0 for one a core", _count),
        "text": _Kind("a file", lambda value: base / _word(value)),
        "quality": _Kind("true or false", _switch),
        "latency": _Kind("true or false", _switch),
        "matrix": _Kind("true or false", _switch),
    }
