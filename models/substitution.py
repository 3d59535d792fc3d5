"""Parts of a transformers model that are replaced while it is exported, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Substitution:
    """``owner.name``, a method, a function or a module's attribute, becomes ``replacement``."""

    owner: Any
    name: str
    replacement: Any


@contextmanager
def installed(substitutions: Iterable[Substitution]) -> Iterator[None]:
    """Inside the block the replacements stand; what an owner held itself is held again afterwards."""
    before = []
    try:
        for s in substitutions:
            before.append((s, vars(s.owner).get(s.name, _ABSENT)))
            setattr(s.owner, s.name, s.replacement)
        yield
    finally:
        for s, held in reversed(before):
            if held is _ABSENT:
                delattr(s.owner, s.name)
            else:
                setattr(s.owner, s.name, held)
