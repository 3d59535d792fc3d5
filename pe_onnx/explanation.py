"""What an encoding is, read off its file: the docstring's sections, the hook and the operators. Imports no encoding.

A docstring begins with a title and says what the encoding is. Sections follow, each a paragraph that begins with its
name: ``Formula::`` with an indented block, ``Paper:``, ``Cost:``, ``Cache:``, ``Limits:``.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pe_onnx import discovery
from pe_onnx.errors import ConfigError

SECTIONS = ("formula", "paper", "cost", "cache", "limits")
BEGIN = re.compile(rf"({'|'.join(SECTIONS)})::?(?:\s+|$)", re.IGNORECASE)
HOOKS = {
    "none": "nothing: the graph is that of a decoder without positions",
    "embed": "a vector added to the token embedding, once",
    "rotate": "queries and keys are turned in every layer, by tables that are made once a step",
    "bias": "a term added to the scores, made once a step",
    "layer": "a mix: each layer has an encoding of its own or shares one",
}
"""What the graph has of each."""
BASES = {"PositionalEncoding": "none", "PerLayer": "layer"}


@dataclass(frozen=True)
class Explanation:
    """Of one encoding; a section that its docstring lacks is empty, and named in ``missing``."""

    name: str
    title: str
    """Without the full stop."""
    text: str
    formula: str
    paper: str
    cost: str
    cache: str
    limits: str
    hook: str
    """One of HOOKS; empty where the file's class does not say."""
    operators: tuple[str, ...]
    """Custom operators, as the graph has them: ``pe_onnx::AlibiBias``."""

    @property
    def missing(self) -> list[str]:
        return [section for section in SECTIONS if not getattr(self, section)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "operators": list(self.operators), "missing": self.missing}


def explain(name: str) -> Explanation:
    """Raises ConfigError for an encoding that is not registered, or whose file is no Python."""
    tree = _parsed(name)
    found = sections(ast.get_docstring(tree) or "")
    return Explanation(name=name, hook=_hook(tree), operators=tuple(dict.fromkeys(_operators(tree))), **found)


def sections(docstring: str) -> dict[str, str]:
    """``title``, ``text`` and each of SECTIONS, empty where there is none; paragraphs of prose in one line each."""
    title, _, rest = docstring.strip().partition("\n")
    found: dict[str, list[str]] = {section: [] for section in ("text", *SECTIONS)}
    at = "text"
    for paragraph in re.split(r"\n\s*\n", rest.strip("\n")):
        begun = BEGIN.match(paragraph)
        if begun:
            at, paragraph = begun[1].lower(), paragraph[begun.end() :]
        lines = paragraph.rstrip().split("\n")
        if not paragraph.strip():
            continue
        block = all(line.startswith("    ") for line in lines)
        found[at].append("\n".join(line[4:] for line in lines) if block else " ".join(paragraph.split()))
    return {"title": title.strip().rstrip("."), **{key: "\n\n".join(parts) for key, parts in found.items()}}


def _parsed(name: str) -> ast.Module:
    path = discovery.path("encodings", name)
    try:
        return ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as Python: {str(error).splitlines()[0]}") from None


def _imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name in the file to the module that it is from and its name there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
    return found


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _others(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Encodings' classes that a file imports, by the name that they have there."""
    for local, (module, original) in _imported(tree).items():
        package, _, stem = module.rpartition(".")
        if package == "pe_onnx.encodings" and original[:1].isupper() and stem in discovery.files("encodings"):
            yield local, _parsed(stem)


def _hook(tree: ast.Module, cls: str | None = None) -> str:
    """The hook that the file's class overrides, or inherits."""
    classes = _classes(tree)
    node = classes.get(cls) if cls else next((c for c in classes.values() if _bases(c)), None)
    if node is None:
        return ""
    own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    for hook in ("embed", "rotate", "bias", "layer"):
        if hook in own:
            return hook
    others = dict(_others(tree))
    for base in _bases(node):
        if base in BASES:
            return BASES[base]
        if base in classes and base != node.name:
            return _hook(tree, base)
        if base in others:
            return _hook(others[base], _imported(tree)[base][1])
    return ""


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def _operators(tree: ast.Module) -> Iterator[str]:
    """Of the file's own, and of the encodings whose classes it extends or mixes."""
    for module, original in _imported(tree).values():
        if module == "pe_onnx.custom_ops":
            yield "pe_onnx::" + "".join(part.capitalize() for part in original.split("_"))
    for _, other in _others(tree):
        yield from _operators(other)
