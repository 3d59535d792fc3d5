"""`pe-onnx generate`: text on stdout, speed on stderr, prompts from everywhere, streams and JSON."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys

import pytest
from command_line import refused
from conftest import Bundles, Cli

import pe_onnx
from pe_onnx.beam_search import BeamOptions

SPEED = re.compile(r"\[\d+ prompt tokens at \d+/s, (\d+) new at [\d.]+ tokens/s\]\n")


def test_no_prompt_at_all(cli: Cli, bundles: Bundles) -> None:
    refused(cli("generate", bundles("rope"), stdin=""), 2, "no prompt")


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        (["CPUExecutionProvider"], ["CPU build", "pe-onnx[gpu]"]),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["NVIDIA driver"]),
    ],
)
def test_cuda_that_cannot_be_had_says_what_is_missing(providers: list[str], words: list[str], bundles: Bundles) -> None:
    """On any machine: what onnxruntime and the system report is put in its place. auto takes the CPU."""
    code = f"""
import os, sys, onnxruntime
exists = os.path.exists
os.path.exists = lambda path: "nvidia" not in str(path) and exists(path)
onnxruntime.get_available_providers = lambda: {providers!r}
from pe_onnx.cli import main
main()
"""
    command = [sys.executable, "-c", code, "generate", str(bundles("rope")), "hi", "-n", "1", "--provider"]
    result = subprocess.run([*command, "cuda"], capture_output=True, text=True)
    refused(result, 2, "provider 'cuda' cannot be had", *words)
    assert subprocess.run([*command, "auto"], capture_output=True).returncode == 0


DRAW = ("--temperature", "5", "--seed", "5")
"""A tiny model is sure of itself: only heat makes it vary."""


def test_generate_prints_the_text_on_stdout_and_the_speed_on_stderr(cli: Cli, bundles: Bundles) -> None:
    expected = pe_onnx.load(bundles("rope")).generate("hello", 7)
    result = cli("generate", bundles("rope"), "hello", "-n", 7)
    assert result.returncode == 0
    assert result.stdout == expected.text + "\n"
    speed = SPEED.fullmatch(result.stderr)
    assert speed is not None, result.stderr
    assert speed[1] == "7"


def test_generate_streams(bundles: Bundles) -> None:
    """stdout is a socket that keeps each write apart."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", "generate", str(bundles("rope")), "hello"]
    with ours, subprocess.Popen([*command, "-n", "20"], stdout=theirs, stderr=subprocess.PIPE) as process:
        theirs.close()
        ours.settimeout(60)
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            pieces.append(ours.recv(65536))
        process.communicate()
    text = pe_onnx.load(bundles("rope")).generate("hello", 20).text
    assert b"".join(pieces).decode() == text + "\n"
    assert len(pieces) > 10


def test_generate_in_json(cli: Cli, bundles: Bundles) -> None:
    result = cli("generate", bundles("rope"), "hello", "-n", 7, "--json")
    document = json.loads(result.stdout)
    expected = pe_onnx.load(bundles("rope")).generate("hello", 7)
    assert document["generations"] == [
        {"text": expected.text, "tokens": expected.tokens, "prompt_tokens": 5, "finish_reason": "length", "score": None}
    ]
    assert document["timing"]["new_tokens"] == 7
    assert SPEED.fullmatch(result.stderr)


def test_beams_are_searched_and_printed_best_first(cli: Cli, bundles: Bundles) -> None:
    options = BeamOptions(3, 0.5, "never", 2)
    prompts = ["hello", "ab"]
    expected = pe_onnx.load(bundles("rope")).generate(prompts, 7, beams=options)
    names = ["1.1: 'hello'", "1.2: 'hello'", "2.1: 'ab'", "2.2: 'ab'"]
    args = ("-n", 7, "--beams", 3, "--length-penalty", 0.5, "--early-stopping", "never", "--return-sequences", 2)
    result = cli("generate", bundles("rope"), *prompts, *args)
    assert result.stdout == "".join(f"--- {n}\n{r.text}\n" for n, r in zip(names, expected, strict=True)), result.stderr
    assert SPEED.fullmatch(result.stderr)
    document = json.loads(cli("generate", bundles("rope"), *prompts, *args, "--json").stdout)
    assert [(row["tokens"], row["score"]) for row in document["generations"]] == [(r.tokens, r.score) for r in expected]
    best = cli("generate", bundles("rope"), "hello", "-n", 7, "--beams", 3, "--echo")
    assert best.stdout == f"hello{pe_onnx.load(bundles('rope')).generate('hello', 7, beams=BeamOptions(3)).text}\n"


def test_several_prompts_are_a_batch(cli: Cli, bundles: Bundles) -> None:
    prompts = ["a", "a longer one", "ü!"]
    alone = [cli("generate", bundles("rope"), prompt, "-n", 6).stdout for prompt in prompts]
    result = cli("generate", bundles("rope"), *prompts, "-n", 6)
    expected = (f"--- {i}: {p!r}\n{text}" for i, (p, text) in enumerate(zip(prompts, alone, strict=True), 1))
    assert result.stdout == "".join(expected)
    speed = SPEED.fullmatch(result.stderr)
    assert speed is not None
    assert speed[1] == "18"
    document = json.loads(cli("generate", bundles("rope"), *prompts, "-n", 6, "--json").stdout)
    assert [row["text"] + "\n" for row in document["generations"]] == alone
    assert [row["prompt_tokens"] for row in document["generations"]] == [1, 12, 3]


def test_stop_ends_the_text_before_it(cli: Cli, bundles: Bundles) -> None:
    args = ("generate", bundles("rope"), "hello", "-n", 60, *DRAW, "--json")
    text = json.loads(cli(*args).stdout)["generations"][0]["text"]
    at = next(i for i in range(3, len(text) - 2) if re.fullmatch(r"\w\W", text[i : i + 2], re.ASCII))
    stop = text[at : at + 2]
    stopped = json.loads(cli(*args, "--stop", "not there", "--stop", stop).stdout)["generations"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(stop)]
    assert len(stopped["tokens"]) < 60
    plain = cli(*args[:-1], "--stop", stop, stdin="")
    assert plain.stdout == stopped["text"] + "\n"


def test_a_seed_gives_the_same_text_again(cli: Cli, bundles: Bundles) -> None:
    texts = [
        cli("generate", bundles("rope"), "hello", "-n", 32, "--temperature", 20, *seed).stdout
        for seed in (("--seed", 1), ("--seed", 1), ("--seed", 2), (), ())
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_the_prompt_may_come_from_standard_input(cli: Cli, bundles: Bundles) -> None:
    expected = cli("generate", bundles("rope"), "two\nlines", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "-n", 6, stdin="two\nlines\n").stdout == expected


def test_echo_prints_the_prompt_first(cli: Cli, bundles: Bundles) -> None:
    plain = cli("generate", bundles("rope"), "hello", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "hello", "-n", 6, "--echo").stdout == "hello" + plain
    assert cli("generate", bundles("rope"), "-n", 6, "--echo", stdin="hello").stdout == "hello" + plain


def test_tokens_are_a_prompt(cli: Cli, bundles: Bundles) -> None:
    ids = ",".join(str(byte) for byte in b"hello")
    expected = cli("generate", bundles("rope"), "hello", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "--tokens", ids, "-n", 6).stdout == expected


def test_tokens_are_the_prompt_of_a_bundle_without_a_tokenizer(
    cli: Cli, bundles: Bundles, places: dict[str, str]
) -> None:
    result = cli("generate", places["no_tokenizer"], "--tokens", "1,2,299", "-n", 6, "--json")
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)["generations"][0]["tokens"]
    assert len(made) == 6
    assert all(0 <= token < 300 for token in made)
    result = cli("generate", places["no_tokenizer"], "--tokens", "1,2,299", "-n", 6)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"\d+", result.stdout) == [str(token) for token in made], "ids, where there is no text"


def test_a_learned_table_is_used_to_its_end(cli: Cli, places: dict[str, str]) -> None:
    """32 tokens fit, and the token after them is still drawn."""
    result = cli("generate", places["learned"], "a" * 32, "-n", 5, "--json")
    assert len(json.loads(result.stdout)["generations"][0]["tokens"]) == 1
    result = cli("generate", places["learned"], "a" * 30, "-n", 5, "--json")
    assert len(json.loads(result.stdout)["generations"][0]["tokens"]) == 3


def test_a_reader_that_goes_away_is_no_traceback(bundles: Bundles) -> None:
    command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", "generate", str(bundles("rope")), "hello"]
    with subprocess.Popen(
        [*command, "-n", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(timeout=60)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1
