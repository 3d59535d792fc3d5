"""What runs without which package, and which extra is named where one is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import EXPORT_HALF
from command_line import refused
from conftest import Bundles

import pe_onnx
from pe_onnx import discovery

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


@pytest.mark.parametrize("package", [*sorted(EXPORT_HALF), "onnxruntime"])
def test_a_hidden_package_is_not_there(package: str) -> None:
    result = without({package}, f"import {package}")
    assert f"No module named '{package}'" in result.stderr


def test_text_is_generated_without_the_export_half(bundles: Bundles) -> None:
    bundle = bundles("rope")
    code = f"""
import pe_onnx
print(pe_onnx.load(sys.argv[1]).generate("hello", 5).tokens)
assert not {EXPORT_HALF!r} & set(sys.modules)
"""
    result = without(EXPORT_HALF, code, bundle)
    assert result.stderr == ""
    assert json.loads(result.stdout) == pe_onnx.load(bundle).generate("hello", 5).tokens


def test_the_commands_of_the_runtime_half_need_no_export_half(bundles: Bundles) -> None:
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


def test_the_bench_needs_neither_the_export_half_nor_a_plotting_package(bundles: Bundles, tmp_path: Path) -> None:
    quick = ("--depths", "8", "--prompt-tokens", 5, "--budget", 0.1, "--threads", 1)
    result = without(EXPORT_HALF | {"matplotlib"}, MAIN, "bench", bundles("rope"), *quick, "--profile")
    assert result.returncode == 0, result.stderr
    assert "RotaryEmbedding encoding" in " ".join(result.stdout.split())
    plot = ("--plot", tmp_path / "figure.png")
    refused(without({"matplotlib"}, MAIN, "bench", bundles("rope"), *quick, *plot), 2, "pip install 'pe-onnx[plot]'")
    torch = ("--compare", "torch")
    refused(without({"torch"}, MAIN, "bench", bundles("rope"), *quick, *torch), 2, "pip install 'pe-onnx[export]'")


def test_bundles_are_compared_without_the_export_half(bundles: Bundles, tmp_path: Path) -> None:
    """The encoding's own weights are not known then."""
    (tmp_path / "text").write_text("a text of more than forty letters, some of them twice")
    quick = ("--text", tmp_path / "text", "--length", "8,40", "--budget", 0.01, "--threads", 1)
    result = without(EXPORT_HALF | {"matplotlib"}, MAIN, "compare", bundles("rope"), *quick, "--json")
    assert result.returncode == 0, result.stderr
    (rope,) = json.loads(result.stdout)["contestants"]
    assert rope["encoding_weights"] is None
    assert rope["lengths"][1]["bits_per_byte"] > 0
    report = ("-o", tmp_path / "r.html")
    refused(without({"matplotlib"}, MAIN, "compare", bundles("rope"), *quick, *report), 2, "'pe-onnx[plot]'")
    assert without(EXPORT_HALF, MAIN, "compare", bundles("rope"), *quick, *report).returncode == 0
    assert (tmp_path / "r.html").exists()


def test_a_byte_bundle_needs_no_tokenizer_package(bundles: Bundles) -> None:
    result = without({"tokenizers", "jinja2"}, MAIN, "generate", bundles("rope"), "hello", "-n", 4)
    assert result.returncode == 0, result.stderr


def test_web_names_the_extra(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("rope", "ort", preset="tiny")
    refused(without({"onnx_ir"}, MAIN, "web", bundle, "-o", tmp_path / "site"), 2, "onnx_ir", "'pe-onnx[export]'")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript", "onnx_ir"])
def test_export_names_the_extra(package: str, tmp_path: Path) -> None:
    result = without({package}, MAIN, "export", "--encoding", "rope", "-o", tmp_path / "bundle")
    refused(result, 2, package, "pip install 'pe-onnx[export]'")
    assert not (tmp_path / "bundle").exists()


def test_export_of_a_checkpoint_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "llama"}')
    result = without({"transformers"}, MAIN, "export", "--model", tmp_path / "checkpoint", "-o", tmp_path / "bundle")
    refused(result, 2, "transformers", "pip install 'pe-onnx[export]'")


def test_parity_names_the_extra(bundles: Bundles) -> None:
    refused(without({"torch"}, MAIN, "parity", bundles("rope")), 2, "pip install 'pe-onnx[export]'")


def test_a_check_names_the_extra(bundles: Bundles) -> None:
    """Once, and not as a failure of each bundle."""
    refused(without({"torch"}, MAIN, "check", bundles("rope")), 2, "pip install 'pe-onnx[export]'")
    refused(without({"onnxruntime"}, MAIN, "check", bundles("rope")), 2, "pe-onnx[cpu]", "pe-onnx[gpu]")


def test_without_onnxruntime_both_extras_are_named(bundles: Bundles) -> None:
    extras = ("onnxruntime is not installed", "pe-onnx[cpu]", "pe-onnx[gpu]")
    refused(without({"onnxruntime"}, MAIN, "generate", bundles("rope"), "hello"), 2, *extras)
    code = "try:\n    import pe_onnx.session\nexcept ImportError as error:\n    print(error)"
    result = without({"onnxruntime"}, code)
    assert result.stdout.count("\n") == 1
    assert all(extra in result.stdout for extra in extras)


def test_inspecting_needs_no_onnxruntime_and_exporting_only_for_the_proof(bundles: Bundles, tmp_path: Path) -> None:
    assert without({"onnxruntime"}, MAIN, "inspect", bundles("rope")).returncode == 0
    export = (MAIN, "export", "--encoding", "rope", "-o", tmp_path / "bundle")
    refused = without({"onnxruntime"}, *export)
    assert refused.returncode == 2
    assert "'pe-onnx[cpu]', or export with --no-verify" in refused.stderr
    assert refused.stderr.count("\n") == 1
    result = without({"onnxruntime"}, *export, "--no-verify")
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


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "pydantic", "prometheus_client", "starlette"])
def test_serve_names_its_extra(bundles: Bundles, package: str) -> None:
    refused(without({package}, MAIN, "serve", bundles("rope"), "--port", 0), 2, package, "'pe-onnx[serve]'")


def test_replicas_name_their_extra(bundles: Bundles) -> None:
    refused(without({"ray"}, MAIN, "serve", bundles("rope"), "--ray"), 2, "ray", "'pe-onnx[serve,ray]'")


def test_serving_needs_no_export_half(bundles: Bundles) -> None:
    code = """
import pe_onnx
from pe_onnx.server.app import create_app
from pe_onnx.server.options import ServerOptions
print(create_app(pe_onnx.load(sys.argv[1]), ServerOptions("m")).title)
"""
    assert without(EXPORT_HALF, code, bundles("rope")).stdout == "pe-onnx\n"


def test_an_encoding_is_explained_without_either_half() -> None:
    hidden = EXPORT_HALF | {"onnxruntime", "matplotlib"}
    result = without(hidden, MAIN, "explain", "rope")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Su et al. 2021" in result.stdout
    for option in ("--count", "--graph"):
        refused(without(hidden, MAIN, "explain", "rope", option), 2, "pip install 'pe-onnx[export]'")
