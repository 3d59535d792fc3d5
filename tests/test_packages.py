"""`pe-onnx package`: what is written, what it is made of, what is refused; the loading is proven in other files."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import small_bundle
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import names, snapshot
from test_bundle_killed import dead_process
from test_missing_packages import EXPORT_HALF, MAIN, without
from tokenizers import Tokenizer

import pe_onnx
from pe_onnx import discovery
from pe_onnx.bundle import read_bundle, write_bundle
from pe_onnx.errors import BundleError, ConfigError, ExportError
from pe_onnx.packager import RECORD, package
from pe_onnx.packages import Options
from pe_onnx.packages.triton import Triton
from pe_onnx.quantization import quantize

CONSUMERS = ("genai", "kserve", "optimum", "transformersjs", "triton")
GIVEN = {
    "genai": Options(eos=(0,)),
    "kserve": Options(storage_uri="s3://bucket/repository"),
}
LARGE = {"vocab_size": 12000, "tie_word_embeddings": False}
"""Weights in a file of their own."""


def test_every_consumer_is_a_file() -> None:
    assert tuple(discovery.names("packages")) == CONSUMERS


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_package(consumer: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("alibi", "portable")
    before = snapshot(bundle)
    made = package(bundle, consumer, tmp_path / "p", GIVEN.get(consumer))
    assert "p" in made.loading(tmp_path / "p").replace("'", " ").replace("/", " ").split()
    record = json.loads((tmp_path / "p" / RECORD).read_text())
    files = {str(path.relative_to(tmp_path / "p")) for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert files == {*record["files"], RECORD}
    assert record["for"] == consumer
    (source,) = record["bundles"]
    assert source["encoding"] == "alibi"
    assert source["files"]["model.onnx"] == read_bundle(bundle).manifest["files"]["model.onnx"]["sha256"]
    graphs = list((tmp_path / "p").rglob("*.onnx"))
    assert graphs
    assert all(path.samefile(bundle / "model.onnx") for path in graphs)
    for path in (tmp_path / "p").rglob("*.json"):
        assert path.stat().st_nlink == 1, "what a user may edit is not the bundle's own"
    assert snapshot(bundle) == before


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_weights_in_a_file_of_their_own(consumer: str, bundles: Bundles, tmp_path: Path) -> None:
    """One file, whatever its name; and the graph finds it."""
    bundle = bundles("alibi", "portable", config=LARGE)
    made = package(bundle, consumer, tmp_path / "p", GIVEN.get(consumer))
    weights = list((tmp_path / "p").rglob("*data"))
    assert weights
    assert all(path.samefile(bundle / "model.onnx.data") for path in weights)
    assert any("no tokenizer" in note for note in made.notes) == (consumer not in ("triton", "kserve"))
    feed = pe_onnx.load(bundle).cache(1, 8)
    expected = feed.prefill([[5, 6, 7]])[0]
    for graph in (tmp_path / "p").rglob("*.onnx"):
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        assert _last_logits(session, read_bundle(bundle).caches).tolist() == expected.tolist()


def _last_logits(session: onnxruntime.InferenceSession, caches: list[tuple[int, int]]) -> Any:
    import numpy as np

    inputs = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), int)}
    inputs["position_ids"] = np.arange(3)[None]
    for i, (K, D) in enumerate(caches):
        inputs |= {f"past_key_values.{i}.{kind}": np.zeros((1, K, 0, D), np.float32) for kind in ("key", "value")}
    return session.run(["logits"], inputs)[0][0, -1]


def test_a_packaged_bundle_can_be_rounded(bundles: Bundles, tmp_path: Path) -> None:
    """onnx-ir refuses files that have a second name; ours are told by their checksums."""
    bundle = bundles("alibi", "portable", config=LARGE)
    package(bundle, "optimum", tmp_path / "p")
    assert (bundle / "model.onnx.data").stat().st_nlink > 1
    quantize(bundle, tmp_path / "q")
    package([bundle, tmp_path / "q"], "transformersjs", tmp_path / "js")
    assert names(tmp_path / "js" / "onnx") == ["model.onnx", "model.onnx_data", "model_q4.onnx", "model_q4.onnx_data"]
    config = json.loads((tmp_path / "js" / "config.json").read_text())
    assert config["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": {"model.onnx": 1, "model_q4.onnx": 1},
    }
    assert pe_onnx.check_parity(tmp_path / "q", modes=["whole"]).passed


@pytest.mark.parametrize("copied", ["asked for", "no links there"])
def test_copies(copied: str, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "")

    if copied == "no links there":
        monkeypatch.setattr(os, "link", refuse)
    bundle = bundles("alibi", "portable")
    package(bundle, "optimum", tmp_path / "p", copy=copied == "asked for")
    assert (tmp_path / "p" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert (tmp_path / "p" / "model.onnx").stat().st_nlink == 1


def test_bytes_as_a_tokenizer(bundles: Bundles, tmp_path: Path) -> None:
    package(bundles("alibi", "portable"), "optimum", tmp_path / "p")
    tokenizer = Tokenizer.from_file(str(tmp_path / "p" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 256
    rng = random.Random(0)
    valid = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = ["".join(map(chr, valid[:0x3000])), " a  b\n\t ", "it's 12,345", "Grüße 🙂👍🏽 東京"]
    texts += ["".join(chr(rng.choice(valid)) for _ in range(40)) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    for byte in range(256):
        assert tokenizer.decode([byte]) == bytes([byte]).decode(errors="replace")


def test_a_configuration_that_is_known(bundles: Bundles, tmp_path: Path) -> None:
    """Grouped heads of a size that is not C / H: optimum divides, Transformers.js counts layers."""
    sizes = {"num_key_value_heads": 2, "head_dim": 24}
    package(bundles("alibi", "portable", config=sizes), "optimum", tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["hidden_size"] // config["num_attention_heads"] == config["head_dim"] == 24
    assert (config["num_key_value_heads"], config["num_hidden_layers"]) == (2, 2)
    assert config["eos_token_id"] is None, "Llama's default, 2, is a byte"
    own = json.loads((tmp_path / "p" / "source_config.json").read_text())
    assert (own["model_type"], own["encoding"]) == ("pe_onnx", "alibi")
    notes = json.loads((tmp_path / "p" / RECORD).read_text())["notes"]
    assert any("stands for 'pe_onnx' with encoding 'alibi'" in note for note in notes)


def test_ends_of_a_text(bundles: Bundles, tmp_path: Path) -> None:
    for consumer in ("optimum", "transformersjs"):
        package(bundles("alibi", "portable"), consumer, tmp_path / consumer, Options(eos=(3, 5)))
        for name in ("config", "generation_config"):
            assert json.loads((tmp_path / consumer / f"{name}.json").read_text())["eos_token_id"] == [3, 5]


# a change to the bundle's manifest, the consumers that refuse it, and what their line says
REFUSED: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({}, ("optimum", "transformersjs", "triton", "kserve"), "needs target = 'portable'.*--target portable"),
    ({"dtype": "bf16", "target": "portable"}, CONSUMERS, "bf16.*--dtype fp16"),
    ({"model": {"windows": [8, 0]}}, ("genai",), "export it without --window-cache"),
    ({"model": {"caches": [[4, 16], [2, 16]]}, "target": "portable"}, ("genai", "optimum"), "heads of 2 x 16, 4 x 16"),
    (
        {"model": {"encoder": {"width": 64, "caches": [[4, 16], [4, 16]]}}, "target": "portable"},
        ("genai", "transformersjs", "triton", "kserve"),
        "is an encoder-decoder.*optimum",
    ),
    (
        {"quantization": {"bits": None, "cache": "int8"}, "target": "portable"},
        ("optimum", "transformersjs", "triton", "kserve"),
        "knows no cache in int8",
    ),
    (
        {"quantization": {"bits": 8}, "dtype": "fp16", "target": "portable"},
        ("transformersjs",),
        "no name for 8-bit weights in float16",
    ),
]


@pytest.mark.parametrize(("changes", "consumers", "message"), REFUSED)
def test_what_is_refused(changes: dict[str, Any], consumers: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_graphless(tmp_path / "b", changes)
    before = snapshot(tmp_path)
    for consumer in consumers:
        with pytest.raises(ConfigError, match=message) as raised:
            package(tmp_path / "b", consumer, tmp_path / "p", GIVEN.get(consumer))
        assert "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before


def write_graphless(folder: Path, changes: dict[str, Any]) -> None:
    """A bundle with another manifest; a package is made of it without a look into its graphs."""
    manifest = copy.deepcopy(small_bundle.manifest())
    for key, value in changes.items():
        manifest[key] = {**manifest[key], **value} if key in ("model", "encoding") else value
    with write_bundle(folder, manifest) as partial:
        for name in ("model.onnx", "encoder_model.onnx", "decoder_model.onnx"):
            (partial / name).write_text("a graph")


def test_a_broken_bundle_is_refused(tmp_path: Path) -> None:
    small_bundle.write(tmp_path / "b", "one")
    (tmp_path / "b" / "model.onnx").write_text("two")
    with pytest.raises(BundleError, match="checksum"):
        package(tmp_path / "b", "genai", tmp_path / "p", Options(eos=(0,)))
    assert names(tmp_path) == ["b"]


MISTAKES = [
    ("{rope} -o p", ["--for"]),
    ("{rope} --for genai", ["--output"]),
    ("--for genai -o p", ["DIR..."]),
    ("{rope} --for optimm -o p", ["'optimm'", "did you mean 'optimum'?", "genai", "triton"]),
    ("{rope} --for optimum -o p", ["'portable'", "'ort'", "--target portable"]),
    ("{rope} --for genai -o p", ["names none", "--eos"]),
    ("{rope} --for genai --eos 256 -o p", ["eos = 256", "0..255"]),
    ("{rope} --for genai --eos x -o p", ["--eos = 'x'", "1,2"]),
    ("{rope} --for genai --eos 0 --context 1 -o p", ["context = 1"]),
    ("{learned} --for genai --eos 0 --context 33 -o p", ["context = 33", "2..32"]),
    ("{rope} --for genai --eos 0 --name x -o p", ["name", "eos, context"]),
    ("{rope} {learned} --for genai --eos 0 -o p", ["one bundle", "2"]),
    ("{rope} --for genai --eos 0 -o taken", ["taken", "exists"]),
    ("{rope} --for genai --eos 0 -o taken --force", ["taken", "not a package"]),
    ("{rope} --for genai --eos 0 -o {rope} --force", ["not a package"]),
    ("{portable} --for kserve -o p", ["--storage-uri", "`repository`"]),
    ("{portable} --for kserve --storage-uri bucket/x -o p", ["'bucket/x'", "s3://"]),
    ("{portable} --for triton --name a/b -o p", ["name = 'a/b'"]),
    ("{portable} {portable} --for transformersjs -o p", ["both 'fp32'"]),
    ("{portable} {other} --for transformersjs -o p", ["both 'fp32'"]),
    ("{portable} {half} --for transformersjs -o p", ["another model", "encoding"]),
]


BUNDLES: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"model": {"max_length": 32}},
    "portable": {"target": "portable"},
    "other": {"target": "portable", "encoding": {"name": "alibi"}},
    "half": {"target": "portable", "encoding": {"name": "alibi"}, "dtype": "fp16"},
}


@pytest.fixture(scope="module")
def graphless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("graphless")
    for name, changes in BUNDLES.items():
        write_graphless(folder / name, changes)
    return {name: str(folder / name) for name in BUNDLES}


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_mistakes(line: str, words: list[str], run: Cli, graphless: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    refused(run("package", *(word.format_map(graphless) for word in line.split())), 2, *words)
    assert snapshot(tmp_path) == before


def test_the_command(run: Cli, bundles: Bundles, tmp_path: Path) -> None:
    done = run("package", bundles("alibi", "portable"), "--for", "triton", "--name", "m", "-o", "p")
    assert (done.returncode, done.stdout) == (0, "tritonserver --model-repository=p\n")
    assert names(tmp_path / "p") == ["README.txt", "m", "m_stateless", RECORD]
    done = run("package", bundles("alibi", "portable"), "--for", "optimum", "-o", "p", "--force")
    assert done.returncode == 0, done.stderr
    assert "ORTModelForCausalLM.from_pretrained('p')" in done.stdout
    assert "note: config.json says llama" in done.stderr
    assert not (tmp_path / "p" / "m").exists()


def test_it_needs_no_export_half(bundles: Bundles, tmp_path: Path) -> None:
    for consumer, options in (("triton", []), ("genai", ["--eos", "0"]), ("transformersjs", [])):
        args = ["package", bundles("alibi", "portable"), "--for", consumer, *options, "-o", tmp_path / consumer]
        result = without(EXPORT_HALF, MAIN, *args)
        assert result.returncode == 0, result.stderr
    args = ["package", bundles("alibi", "portable", config=LARGE), "--for", "transformersjs", "-o", tmp_path / "large"]
    refused(without(EXPORT_HALF, MAIN, *args), 2, "pip install 'pe-onnx[export]'")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "")], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_nothing_half_written(
    error: BaseException, old: bool, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles("alibi", "portable")
    if old:
        package(bundle, "optimum", tmp_path / "a" / "p")
    before = snapshot(tmp_path)

    def half(self: Triton, folder: Path) -> None:
        (folder / "README.txt").write_text("half")
        raise error

    monkeypatch.setattr(Triton, "write", half)
    with pytest.raises(ExportError if isinstance(error, OSError) else KeyboardInterrupt):
        package(bundle, "triton", tmp_path / "a" / "p", force=True)
    assert snapshot(tmp_path) == before


def test_what_a_killed_run_left_is_removed(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / f".p.partial-{dead_process()}-x").mkdir()
    package(bundles("alibi", "portable"), "triton", tmp_path / "p")
    assert names(tmp_path) == ["p"]
