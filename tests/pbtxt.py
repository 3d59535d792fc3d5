"""Protobuf's text format without a schema: a message is a dict of lists, an entry for each time a field is set."""

from __future__ import annotations

import json
import re
from typing import Any

TOKEN = re.compile(r'\s*(?:#[^\n]*\n)?\s*("(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*|-?\d+|[][{}:,])')


def parse(text: str) -> dict[str, list[Any]]:
    tokens = TOKEN.findall(text)
    assert not TOKEN.sub("", text).strip()
    message, rest = _message(tokens)
    assert not rest
    return message


def _message(tokens: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    found: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name, tokens = tokens[0], tokens[1:]
        if tokens[0] == ":":
            tokens = tokens[1:]
        values, tokens = _list(tokens[1:]) if tokens[0] == "[" else _one(tokens)
        found.setdefault(name, []).extend(values)
    return found, tokens


def _list(tokens: list[str]) -> tuple[list[Any], list[str]]:
    values: list[Any] = []
    while tokens[0] != "]":
        more, tokens = _one(tokens)
        values += more
        assert tokens[0] in ",]"
        if tokens[0] == ",":
            tokens = tokens[1:]
    return values, tokens[1:]


def _one(tokens: list[str]) -> tuple[list[Any], list[str]]:
    if tokens[0] == "{":
        message, tokens = _message(tokens[1:])
        assert tokens[0] == "}"
        return [message], tokens[1:]
    first = tokens[0]
    if first in ("true", "false"):
        return [first == "true"], tokens[1:]
    plain = first if first[0].isalpha() else json.loads(first)
    return [plain], tokens[1:]
