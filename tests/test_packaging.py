"""The package as it is installed: what the wheel holds, what imports what, and what runs without which package."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import pe_onnx
from pe_onnx import discovery

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

FOLDERS = {"pe_onnx": "pe_onnx", "pe_onnx.custom_ops": "custom_ops", "pe_onnx.models": "models"}
"""Package to its folder in the checkout; each holds its sub-packages too."""

LAYERS = [
    ("errors",),
    ("discovery", "config", "contract"),
    ("bundle",),
    ("custom_ops",),
    ("encoding",),
    ("encodings",),
    ("models",),
    ("passes",),
    ("exporter",),
    ("session",),
    ("kv_cache", "tokenizer", "sampling"),
    ("generate",),
    ("reference",),
    ("parity", "bench"),
    ("cli",),
]
"""The import order of design.md, section 2, lowest first; a module imports lower layers only, or its own package.

Two places differ from the order in which data flows. The exporter writes its bundle through ``bundle``, which knows
nothing of models: it stands below. ``encoding``, the base class, stands below ``encodings``, the files found by name.
"""

EXPORT_HALF = {"torch", "transformers", "safetensors", "gguf", "accelerate", "onnx", "onnxscript", "onnx_ir"}
RUNTIME = ("bundle", "session", "kv_cache", "tokenizer", "sampling", "generate")
"""Never import the export half; what stands above them does, inside functions."""


def sources() -> dict[str, Path]:
    """Every module of the checkout by its installed name; the two symlinks are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if (ROOT / folder / parts[0]).is_symlink():
                continue
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()


def wheel_path(module: str, path: Path) -> str:
    """Where a module stands in the wheel."""
    return module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, symlinks and all, where a build may leave what it likes."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pe_onnx", "custom_ops", "models"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session", params=["wheel", "sdist"])
def wheel(request: pytest.FixtureRequest, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the checkout, and the one built from the source distribution."""
    output = tmp_path_factory.mktemp("dist")
    only = ["--wheel"] if request.param == "wheel" else []
    command = [sys.executable, "-m", "build", "--no-isolation", *only, "-o", str(output), str(clone)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    shutil.rmtree(clone / "build", ignore_errors=True)  # setuptools would take what lies there into the next wheel
    assert built.returncode == 0, built.stdout + built.stderr
    return next(output.glob("*.whl"))


def test_the_packages_list_equals_the_folders() -> None:
    folders = {module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in SOURCES.items()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_package_has_an_init() -> None:
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert SOURCES[package].name == "__init__.py"


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = pe_onnx.__version__
    assert {name.split("/")[0] for name in names} == {"pe_onnx", f"pe_onnx-{version}.dist-info"}
    modules = {wheel_path(module, path) for module, path in SOURCES.items()}
    assert {name for name in names if name.startswith("pe_onnx/")} == {
        *modules,
        "pe_onnx/py.typed",
        "pe_onnx/families.json",
    }


def test_the_wheel_has_the_command_and_the_version_of_the_code(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name}
    assert "pe-onnx = pe_onnx.cli:main" in read["entry_points.txt"]
    assert f"\nVersion: {pe_onnx.__version__}\n" in read["METADATA"]


@pytest.mark.parametrize("name", [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]])
def test_what_the_metadata_names_is_there(name: str) -> None:
    assert (ROOT / name).is_file(), f"pyproject.toml names {name}; setuptools only warns"


def test_the_wheel_finds_its_files_by_name(wheel: Path, tmp_path: Path) -> None:
    """Discovery reads folders, which lie elsewhere once installed."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    packages = ("encodings", "custom_ops", "models", "passes", "cli")
    code = (
        "import json, pe_onnx; from pe_onnx import discovery; "
        f"print(json.dumps([pe_onnx.__file__, {{p: discovery.names(p) for p in {packages}}}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
    )
    file, names = json.loads(result.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert names == {package: discovery.names(package) for package in packages}
    assert all(names.values())


@pytest.mark.parametrize("name", ["custom_ops", "models"])
def test_symlinks(name: str) -> None:
    link = ROOT / "pe_onnx" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    tracked = subprocess.run(
        ["git", "ls-files", "-s", f"pe_onnx/{name}"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert tracked.startswith("120000 "), "the symlink is not committed as one"


def test_a_clone_that_is_not_installed_works(clone: Path) -> None:
    code = "import pe_onnx.models.decoder as d, pe_onnx.custom_ops as c; print(d.__file__); print(c.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(clone)}, cwd=clone.parent
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(clone) for line in result.stdout.split())


@pytest.mark.parametrize("name", ["custom_ops", "models"])
def test_a_second_name_is_refused(name: str) -> None:
    """Under two names an operator would be registered twice, and the export's table would miss it."""
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"ImportError: import pe_onnx.{name}, not {name}" in result.stderr


# What imports what


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


# What runs without which package

WITHOUT = """
import sys
HIDDEN = {hidden!r}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
MAIN = "from pe_onnx.cli import main; main()"


def without(hidden: set[str], code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process where some packages are not installed."""
    command = [sys.executable, "-c", WITHOUT.format(hidden=hidden) + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.stderr.startswith("pe-onnx: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.returncode == code
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("package", [*sorted(EXPORT_HALF), "onnxruntime"])
def test_a_hidden_package_is_not_there(package: str) -> None:
    result = without({package}, f"import {package}")
    assert f"No module named '{package}'" in result.stderr


def test_text_is_generated_without_the_export_half(bundles: Callable[..., Path]) -> None:
    bundle = bundles("rope")
    code = f"""
import pe_onnx
print(pe_onnx.load(sys.argv[1]).generate("hello", 5).tokens)
assert not {EXPORT_HALF!r} & set(sys.modules)
"""
    result = without(EXPORT_HALF, code, bundle)
    assert result.stderr == ""
    assert json.loads(result.stdout) == pe_onnx.load(bundle).generate("hello", 5).tokens


def test_the_commands_of_the_runtime_half_need_no_export_half(bundles: Callable[..., Path]) -> None:
    bundle = bundles("rope")
    for args, expected in (
        (["inspect", bundle], "[batch_size, 4, past_sequence_length, 16]"),
        (["list"], "t5_bias"),
        (["generate", bundle, "hello", "-n", 4], "\n"),
        (["export", "--help"], "--encoding"),
    ):
        result = without(EXPORT_HALF, MAIN, *args)
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


def test_a_byte_bundle_needs_no_tokenizer_package(bundles: Callable[..., Path]) -> None:
    result = without({"tokenizers", "jinja2"}, MAIN, "generate", bundles("rope"), "hello", "-n", 4)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript", "onnx_ir"])
def test_export_names_the_extra(package: str, tmp_path: Path) -> None:
    result = without({package}, MAIN, "export", "--encoding", "rope", "-o", tmp_path / "bundle")
    one_line(result, 2, package, "pip install 'pe-onnx[export]'")
    assert not (tmp_path / "bundle").exists()


def test_export_of_a_checkpoint_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "llama"}')
    result = without({"transformers"}, MAIN, "export", "--model", tmp_path / "checkpoint", "-o", tmp_path / "bundle")
    one_line(result, 2, "transformers", "pip install 'pe-onnx[export]'")


def test_parity_names_the_extra(bundles: Callable[..., Path]) -> None:
    one_line(without({"torch"}, MAIN, "parity", bundles("rope")), 2, "pip install 'pe-onnx[export]'")


def test_without_onnxruntime_both_extras_are_named(bundles: Callable[..., Path]) -> None:
    extras = ("onnxruntime is not installed", "pe-onnx[cpu]", "pe-onnx[gpu]")
    one_line(without({"onnxruntime"}, MAIN, "generate", bundles("rope"), "hello"), 2, *extras)
    code = "try:\n    import pe_onnx.session\nexcept ImportError as error:\n    print(error)"
    result = without({"onnxruntime"}, code)
    assert result.stdout.count("\n") == 1
    assert all(extra in result.stdout for extra in extras)


def test_inspecting_and_exporting_need_no_onnxruntime(bundles: Callable[..., Path], tmp_path: Path) -> None:
    assert without({"onnxruntime"}, MAIN, "inspect", bundles("rope")).returncode == 0
    result = without({"onnxruntime"}, MAIN, "export", "--encoding", "rope", "-o", tmp_path / "bundle")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], *([command, "--help"] for command in discovery.names("cli"))], ids=" ".join
)
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    heavy = EXPORT_HALF | {"numpy", "onnxruntime", "rich", "tokenizers", "jinja2"}
    code = f"""
import sys
from pe_onnx.cli import main
try:
    main()
finally:
    print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout
    assert result.stderr == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("wheel", ["wheel"], indirect=True)
def test_a_real_environment_without_torch(wheel: Path, bundles: Callable[..., Path], tmp_path: Path) -> None:
    """``pip install 'pe-onnx[cpu]'`` into an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run(
        [binaries / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]"],
        check=True,
        timeout=600,
    )

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path)

    for package in ("torch", "transformers", "onnx"):
        assert f"No module named '{package}'" in run(binaries / "python", "-c", f"import {package}").stderr
    bundle = bundles("rope")
    result = run(binaries / "pe-onnx", "generate", bundle, "hello", "-n", 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout == pe_onnx.load(bundle).generate("hello", 5).text + "\n"
    assert run(binaries / "pe-onnx", "inspect", bundle).returncode == 0
    assert run(binaries / "pe-onnx", "list").returncode == 0
    one_line(run(binaries / "pe-onnx", "export", "--encoding", "rope", "-o", "b"), 2, "pip install 'pe-onnx[export]'")
