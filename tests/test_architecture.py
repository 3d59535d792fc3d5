"""What imports what: lower layers only, and no package of the export half in the runtime half."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping

import pytest
from checkout import EXPORT_HALF, ROOT, SOURCES

import pe_onnx

LAYERS = [
    ("errors",),
    ("discovery", "config", "contract", "tolerance", "machine", "report_files", "plain_values", "block_quantization"),
    ("npm_packages", "explanation", "position_channels"),
    ("intervals", "graph_nodes", "external_weights", "fresh_process", "yardstick_model", "prepared", "cuda_memory"),
    ("attribution", "turns", "providers"),
    ("device_arrays", "doctor"),
    ("placing", "trained_weights"),
    ("bundle",),
    ("prepared_graph",),
    ("session",),
    ("custom_ops",),
    ("encoding",),
    ("encodings",),
    ("models",),
    ("passes", "decomposition"),
    ("tracing", "verification"),
    ("writing",),
    ("exporter",),
    ("reordering", "memory", "saved_cache", "encoding_cost"),
    ("sources",),
    ("cached_rows",),
    ("growing_cache",),
    ("kv_cache", "tokenizer", "sampling"),
    ("packages",),
    ("packager", "calibration"),
    ("quantization",),
    ("beam_search", "memory_plan"),
    ("generate", "contestants", "yardstick", "text_bits", "trained_contestants"),
    ("server",),
    ("operator_times", "relative"),
    ("bench_report", "baselines", "comparison_figures"),
    ("bench_tables",),
    ("exposed", "divergence"),
    ("angles", "session_matrix", "rounded_module"),
    ("encoding_graph",),
    ("site",),
    ("reference", "parity_modes", "parity_report"),
    ("twin",),
    ("replay", "blame"),
    ("seq2seq_parity",),
    ("eager",),
    ("parity", "latency", "regression", "comparison", "comparison_tables"),
    ("plots", "failing_run", "quality"),
    ("bisection", "encoding_pictures"),
    ("named_reference", "check_report", "commands", "comparison_plots"),
    ("suite", "check_junit", "check_markdown", "comparison_report"),
    ("check_parts",),
    ("checking",),
    ("cli", "pytest_plugin"),
]
"""The import order of design.md, section 2, lowest first; a module imports lower layers only, or its own package.

Some places differ from the order in which data flows. The exporter writes its bundle through ``bundle`` and proves it
in a ``session``, which know nothing of models: they stand below. ``encoding``, the base class, stands below
``encodings``, the files found by name.
"""
RUNTIME = (
    *("cuda_memory", "providers", "device_arrays", "doctor", "prepared", "placing", "bundle", "prepared_graph"),
    *("session", "memory", "sources", "reordering", "saved_cache", "cached_rows", "growing_cache", "kv_cache"),
    *("memory_plan", "tokenizer", "packages", "packager", "sampling", "beam_search", "generate"),
    "server",
    *("machine", "report_files", "plain_values", "explanation", "position_channels"),
    *("intervals", "graph_nodes", "fresh_process", "attribution", "turns", "contestants"),
    *("operator_times", "yardstick_model", "yardstick", "relative", "baselines", "regression"),
    *("bench_report", "bench_tables", "text_bits", "comparison_figures", "comparison_tables"),
)
"""Never import the export half; what stands above them does, inside functions."""


def found_imports(module: str, source: str, modules: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """Each module that a source imports, and whether that happens when it is imported itself.

    ``if TYPE_CHECKING`` is left out: it never runs. ``importlib.import_module`` of a literal counts.
    """

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module if getattr(modules.get(module), "name", "") == "__init__.py" else ""
                    anchor = package or module.rpartition(".")[0]
                    base = importlib.util.resolve_name("." * child.level + base, anchor)
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield (full if full in modules else base), now
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), now)
            else:
                if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                    argument = child.args[0]
                    if isinstance(argument, ast.Constant):
                        yield str(argument.value), now
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, now and not function)

    yield from walk(ast.parse(source), True)


def layer(module: str) -> int | None:
    """Index in LAYERS; None for the package itself or a module that is not in it."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def order_violations(texts: Mapping[str, str], modules: Mapping[str, object]) -> list[str]:
    """Imports that do not go to a lower layer or stay within one package."""
    wrong = []
    for module, text in texts.items():
        own = layer(module)
        if module == "pe_onnx":
            own = -1  # its verbs are loaded by name when they are called
        if own is None:
            wrong.append(f"{module} has no layer: enter it in LAYERS")
            continue
        for target, now in found_imports(module, text, modules):
            if not target.startswith("pe_onnx.") or (own < 0 and not now):
                continue
            other = layer(target)
            same_package = target.split(".")[:2] == module.split(".")[:2]
            if other is None or (other >= own and not same_package):
                wrong.append(f"{module} imports {target}")
    return wrong


def half_violations(texts: Mapping[str, str], modules: Mapping[str, object]) -> list[str]:
    """Paths by which importing the runtime half would import a package of the export half."""
    wrong = []
    for start in texts:
        if layer(start) is not None and start.split(".")[1] not in (*RUNTIME, "parity", "bench", "cli", "contract"):
            continue
        seen, queue = {start}, [[start]]
        while queue:
            path = queue.pop()
            for target, now in found_imports(path[-1], texts[path[-1]], modules):
                within = path[-1] == start and path[-1].split(".")[-1] in RUNTIME  # those not even inside a function
                if target.split(".")[0] in EXPORT_HALF and (now or within):
                    wrong.append(" -> ".join([*path, target]))
                if now and target in texts and target not in seen:
                    seen.add(target)
                    queue.append([*path, target])
    return wrong


TEXTS = {module: path.read_text("utf-8") for module, path in SOURCES.items()}


def test_nothing_imports_upwards() -> None:
    assert order_violations(TEXTS, SOURCES) == []


def test_the_runtime_half_imports_no_export_package() -> None:
    assert half_violations(TEXTS, SOURCES) == []


@pytest.mark.parametrize(
    ("module", "line", "caught"),
    [
        ("session", "from pe_onnx.generate import load", True),
        ("session", "from pe_onnx import generate", True),
        ("session", "def f():\n    import pe_onnx.generate", True),
        ("session", "from .generate import load", True),
        ("session", "try:\n    from pe_onnx.cli import main\nexcept ImportError:\n    pass", True),
        ("tokenizer", "from pe_onnx.kv_cache import Tokens", True),
        ("errors", "import importlib\nimportlib.import_module('pe_onnx.config')", True),
        ("new_thing", "import json", True),
        (
            "session",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pe_onnx.generate import Model",
            False,
        ),
        ("generate", "from pe_onnx.session import Session", False),
        ("models.bridge", "from pe_onnx.models import attention", False),
    ],
)
def test_the_order_check_catches(module: str, line: str, caught: bool) -> None:
    name = f"pe_onnx.{module}"
    assert bool(order_violations({name: line}, {**SOURCES, name: ROOT / f"{module}.py"})) == caught


@pytest.mark.parametrize(
    ("module", "line", "caught"),
    [
        ("session", "import torch", True),
        ("session", "def f():\n    import torch", True),
        ("parity", "try:\n    import transformers.utils\nexcept ImportError:\n    pass", True),
        ("parity", "from pe_onnx.reference import from_module", True),
        ("cli.list", "from pe_onnx.models import bridge", True),
        ("parity", "def f():\n    from pe_onnx.reference import from_module", False),
        ("cli.list", "def f():\n    import torch", False),
    ],
)
def test_the_half_check_catches(module: str, line: str, caught: bool) -> None:
    assert bool(half_violations({**TEXTS, f"pe_onnx.{module}": line}, SOURCES)) == caught


def test_the_public_verbs_exist() -> None:
    """And stay functions: no module is named like a verb, or importing it would put the module in its place."""
    for name in pe_onnx.__all__:
        value = getattr(pe_onnx, name)
        assert callable(value) != (f"pe_onnx.{name}" in SOURCES or name == "__version__")
    assert set(pe_onnx.__all__) == set(dir(pe_onnx))
