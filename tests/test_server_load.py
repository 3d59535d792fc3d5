"""``pe-onnx serve`` under load: many clients, many requests, garbage."""

from __future__ import annotations

import json
import random
import re
import string
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import servers

import pe_onnx
from pe_onnx.generate import Model

Bundles = Callable[..., Path]
UNTIED = {"tie_word_embeddings": False}
CLIENTS, NEW = 64, 48
LEAST_LEAD = 1e-3
"""Of the most likely token's logit over the next, in an answer that is compared: what a batch sums in another order
moves them by 1e-5."""


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    beginnings = ["", "", "Once upon a time ", "Dear reader, "]
    return [
        rng.choice(beginnings) + "".join(rng.choices(string.ascii_letters, k=rng.randrange(1, 60)))
        for _ in range(count)
    ]


def led(model: Model, prompt: str) -> str | None:
    """The greedy text; None where two tokens come so near that another sum may turn them."""
    cache = model.cache(1, 256)
    logits = cache.prefill([model.tokenizer.encode(prompt)])[0]
    tokens: list[int] = []
    while len(tokens) < NEW:
        second, first = np.sort(logits)[-2:]
        if first - second < LEAST_LEAD:
            return None
        tokens.append(int(logits.argmax()))
        logits = cache.decode(tokens[-1:])[0]
    expected = model.generate(prompt, NEW, ignore_eos=True)
    assert expected.tokens == tokens
    return expected.text


def ask(server: servers.Served, prompt: str, new: int = NEW, stream: bool = False) -> str:
    body = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": stream}
    answer = httpx.post(f"{server.base_url}/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    if not stream:
        text: str = answer.json()["choices"][0]["text"]
        return text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


@pytest.mark.slow
def test_64_clients_get_what_each_gets_alone(bundles: Bundles) -> None:
    bundle = bundles("rope", "ort", preset="small", config=UNTIED)
    model = pe_onnx.load(bundle)
    expected = {prompt: text for prompt in texts(CLIENTS + 24, 1) if (text := led(model, prompt)) is not None}
    prompts = list(expected)[:CLIENTS]
    assert len(prompts) == CLIENTS
    assert len(set(expected.values())) > CLIENTS // 2
    with servers.serve(bundle, "--name", "m", "--max-length", 512) as server, ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda i: ask(server, prompts[i], stream=i % 2 == 0), range(CLIENTS)))
        assert [text for text, prompt in zip(found, prompts, strict=True) if text != expected[prompt]] == []
        assert server.metric("pe_onnx_steps_taken") < CLIENTS * NEW / 4  # they shared steps
        assert server.metric("pe_onnx_reused_tokens_total") > 0


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(bundles: Bundles) -> None:
    bundle = bundles("rope", "ort", preset="tiny", config=UNTIED)

    def resident_kb(server: servers.Served) -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]

    prompts = texts(2000, 2)
    with servers.serve(bundle, "--name", "m", "--max-length", 128) as server, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: ask(server, prompt, 8, len(prompt) % 2 == 0), prompts[:500]))
        before = resident_kb(server)
        list(pool.map(lambda prompt: ask(server, prompt, 8, len(prompt) % 2 == 0), prompts[500:]))
        assert resident_kb(server) - before < 4_000
        assert server.metric("pe_onnx_requests_total") >= 2000


@pytest.mark.slow
def test_a_thousand_bodies_of_garbage(bundles: Bundles, tmp_path: Path) -> None:
    """Schemathesis, from the server's own description: right and wrong bodies, headers and methods."""
    bundle = servers.with_chat(bundles("rope", "ort", preset="tiny", config=UNTIED), tmp_path / "m")
    limits = ("--max-length", 64, "--max-new-tokens", 8, "--slots", 4)
    with servers.serve(bundle, *limits) as server:
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.address}/openapi.json"),
            *("--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "500", "--mode", "all", "--seed", "1"),
            *("--workers", "2", "--no-color", "--request-timeout", "60"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
        assert result.returncode == 0, result.stdout[-6000:]
        assert server.metric("pe_onnx_requests_total") > 1000
        statuses = httpx.get(f"{server.address}/metrics").text
        assert re.findall(r'status="5\d\d"', statuses) == []
        assert ask(server, "still there", 4)
        assert "Traceback" not in "".join(server.errors)
