"""The package as it is installed: what the wheel holds, and that it runs from where it lies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, SOURCES
from command_line import refused
from conftest import Bundles

import pe_onnx
from pe_onnx import discovery

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


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
        "pe_onnx/calibration.txt",
        "pe_onnx/quality.txt",
        "pe_onnx/check.schema.json",
        *(f"pe_onnx/{name}/{path.name}" for name in ("trained", "web") for path in (ROOT / "pe_onnx" / name).iterdir()),
    }


def test_the_wheel_has_the_command_and_the_version_of_the_code(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name}
    assert "pe-onnx = pe_onnx.cli:main" in read["entry_points.txt"]
    assert "[pytest11]\npe_onnx = pe_onnx.pytest_plugin" in read["entry_points.txt"]
    assert f"\nVersion: {pe_onnx.__version__}\n" in read["METADATA"]


@pytest.mark.parametrize("name", [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]])
def test_what_the_metadata_names_is_there(name: str) -> None:
    assert (ROOT / name).is_file(), f"pyproject.toml names {name}; setuptools only warns"


def test_the_wheel_finds_its_files_by_name(wheel: Path, tmp_path: Path) -> None:
    """Discovery reads folders, which lie elsewhere once installed."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    packages = ("encodings", "custom_ops", "models", "packages", "passes", "cli")
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


@pytest.mark.slow
@pytest.mark.parametrize("wheel", ["wheel"], indirect=True)
def test_a_real_environment_without_torch(wheel: Path, bundles: Bundles, tmp_path: Path) -> None:
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
    refused(run(binaries / "pe-onnx", "export", "--encoding", "rope", "-o", "b"), 2, "pip install 'pe-onnx[export]'")
