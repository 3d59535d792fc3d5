"""What is wrong with a body, in one line: of pydantic's errors, one for each form it might have, the one that helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FORMS = {
    "prompt": "text, a list of token ids, or a list of these, none of them empty",
    "stop": "text, or a list of texts, none of them empty",
    "content": "text, or a list of parts of type text",
}
"""Of parameters that take several forms."""
KINDS = ("string_type", "list_type", "int_type", "dict_type", "model_type")
"""pydantic's names for a value of another kind, which it reports for each form that was not meant."""


def explained(errors: Sequence[Any]) -> tuple[str, str]:
    """The place, empty for the body itself, and what is accepted there. Nothing of what the body held."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "", f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    error = max((e for e in errors if e["loc"][1:2] == first["loc"][1:2]), key=_helpful)
    if error["type"] == "extra_forbidden":
        return _place(error["loc"]), "is not supported here; leave it out"
    if error["type"] in KINDS:
        named = [part for part in error["loc"] if part in FORMS]
        if named:
            return _place(error["loc"]), f"accepted is {FORMS[named[-1]]}"
    return _place(error["loc"]), str(error["msg"])


def _helpful(error: Any) -> tuple[bool, int]:
    return error["type"] not in KINDS, sum(isinstance(part, int) for part in error["loc"])


def _place(loc: Sequence[Any]) -> str:
    """``messages.0.content``, without pydantic's names of the forms it tried."""
    return ".".join(str(part) for part in loc[1:] if isinstance(part, int) or _names(part))


def _names(part: str) -> bool:
    """Whether it is a parameter, and not ``constrained-str`` or ``list[...]``."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool")
