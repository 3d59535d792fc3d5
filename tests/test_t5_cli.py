"""`pe-onnx generate` on an encoder-decoder: sources from everywhere, and what does not go with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import t5_models
from command_line import refused
from conftest import Bundles, Cli
from transformers import ByT5Tokenizer

import pe_onnx
from pe_onnx.beam_search import BeamOptions
from pe_onnx.errors import ConfigError
from pe_onnx.generate import Generation, Model
from pe_onnx.sampling import SamplingOptions

SPEED = re.compile(r"\[(\d+) prompt tokens at \d+/s, (\d+) new at [\d.]+ tokens/s\]\n")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ByT5 whose head prefers ASCII, so that there is text to read."""
    folder = tmp_path_factory.mktemp("byt5")
    model = t5_models.build("byt5", untied=True)
    readable = [token for token in range(384) if 0x61 + 3 <= token < 0x7B + 3]
    scale = model.lm_head.weight.data
    scale[[token for token in range(384) if token not in readable]] *= 0.1
    model.save_pretrained(folder / "c")
    ByT5Tokenizer().save_pretrained(folder / "c")
    pe_onnx.export(model=folder / "c", output=folder / "b", target="ort", verify=False)
    return folder / "b"


@pytest.fixture
def without_tokenizer(t5_bundles: Bundles) -> Path:
    return t5_bundles("flan_untied", "portable", eos_token_id=t5_models.ENDS)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return pe_onnx.load(bundle)


def answer(model: Model, source: str, tokens: int, **options: object) -> Generation:
    result = model.generate(source, tokens, **options)  # type: ignore[call-overload]
    assert isinstance(result, Generation)
    assert len(set(result.text)) > 2, "a text that says nothing"
    return result


def test_the_text_is_the_answer(cli: Cli, bundle: Path, model: Model) -> None:
    wanted = answer(model, "a house", 9)
    result = cli("generate", bundle, "a house", "-n", 9)
    assert result.stdout == wanted.text + "\n", result.stderr
    speed = SPEED.fullmatch(result.stderr)
    assert speed is not None
    assert speed.groups() == ("8", "9"), "the source's end token counts"
    assert cli("generate", bundle, "-n", 9, stdin="a house\n").stdout == result.stdout
    ids = ",".join(str(byte + 3) for byte in b"a house")
    assert cli("generate", bundle, "--tokens", f"{ids},1", "-n", 9).stdout == result.stdout


def test_several_sources_are_a_batch(cli: Cli, bundle: Path, model: Model) -> None:
    sources = ["a", "a longer one", "ü!", ""]
    wanted = [model.generate(source, 8).text for source in sources]
    result = cli("generate", bundle, *sources, "-n", 8)
    named = [f"--- {i}: {s!r}\n{text}\n" for i, (s, text) in enumerate(zip(sources, wanted, strict=True), 1)]
    assert result.stdout == "".join(named), result.stderr
    document = json.loads(cli("generate", bundle, *sources, "-n", 8, "--json").stdout)
    assert [row["text"] for row in document["generations"]] == wanted
    assert [row["prompt_tokens"] for row in document["generations"]] == [2, 13, 4, 1]


def test_drawn_text_follows_the_seed(cli: Cli, bundle: Path, model: Model) -> None:
    drawn = answer(model, "hello", 24, sampling=SamplingOptions(temperature=3, seed=4)).text
    args = ("generate", bundle, "hello", "-n", 24, "--temperature", 3, "--seed")
    assert cli(*args, 4).stdout == drawn + "\n"
    assert cli(*args, 5).stdout != drawn + "\n"


def test_beams_best_first(cli: Cli, bundle: Path, model: Model) -> None:
    sources = ["hello", "ab"]
    wanted = model.generate(sources, 7, beams=BeamOptions(3, 0.5, "never", 2))
    names = ["1.1: 'hello'", "1.2: 'hello'", "2.1: 'ab'", "2.2: 'ab'"]
    args = ("-n", 7, "--beams", 3, "--length-penalty", 0.5, "--early-stopping", "never", "--return-sequences", 2)
    result = cli("generate", bundle, *sources, *args)
    assert result.stdout == "".join(f"--- {n}\n{r.text}\n" for n, r in zip(names, wanted, strict=True)), result.stderr


def test_stop_and_lengths(cli: Cli, bundle: Path, model: Model) -> None:
    text = answer(model, "hello", 24).text
    stop = text[5:7]
    result = json.loads(cli("generate", bundle, "hello", "-n", 24, "--stop", stop, "--json").stdout)["generations"][0]
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"
    rows = json.loads(cli("generate", bundle, "hello", "-n", 24, "--max-length", 4, "--json").stdout)["generations"]
    assert [len(row["tokens"]) for row in rows] == [4], "the start token is the first of a row"


def test_token_ids_where_there_is_no_tokenizer(cli: Cli, without_tokenizer: Path) -> None:
    wanted = pe_onnx.load(without_tokenizer).generate([5, 6, 7], 6).tokens  # type: ignore[union-attr]
    result = cli("generate", without_tokenizer, "--tokens", "5,6,7", "-n", 6)
    assert result.stdout == ",".join(map(str, wanted)) + "\n", result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hi", "--chat"], ["--chat", "encoder-decoder"]),
        (["--chat"], ["--chat", "encoder-decoder"]),
        (["hi", "--chat", "--system", "be brief"], ["--chat", "encoder-decoder"]),
        (["hi", "--echo"], ["--echo", "encoder-decoder"]),
        (["hi", "--save-cache", "c"], ["--save-cache", "encoder-decoder"]),
        (["--tokens", "5,6", "--echo"], ["--echo", "encoder-decoder"]),
        (["--tokens", "5,384"], ["384", "0..383"]),
        (["hi", "--tokens", "5"], ["--tokens"]),
        (["hi", "--beams", "2", "--stop", "a"], ["stop", "num_beams = 2"]),
        (["hi", "--beams", "2", "--temperature", "1"], ["temperature = 1.0", "num_beams = 2"]),
        ([], ["no prompt"]),
    ],
    ids=lambda value: " ".join(value) if value else "nothing",
)
def test_what_does_not_go_together(args: list[str], words: list[str], cli: Cli, bundle: Path) -> None:
    refused(cli("generate", bundle, *args, stdin=""), 2, *words)


def test_text_without_a_tokenizer(cli: Cli, without_tokenizer: Path) -> None:
    refused(cli("generate", without_tokenizer, "hi"), 2, "no tokenizer", "--tokens")


def test_a_cache_is_neither_saved_nor_reused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither saved nor loaded"):
        model.load_cache(tmp_path / "c")
    cache = model.cache(sources=[[5, 6]])
    with pytest.raises(ConfigError, match="cannot be saved"):
        cache.save(tmp_path / "c")
    with pytest.raises(ConfigError, match="no prompt to reuse"):
        cache.reuse([[1]])
