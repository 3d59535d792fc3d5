"""What a server gives to 1, 4, 16 and 64 clients at once, and what it costs beside ``generate``.

Each client asks for greedy answers of a fixed length to prompts that no other has, one after the other, over HTTP and
without streaming, then with it. All take turns in short rounds; what is told is the median over rounds of the ratio to
the single client of the same round. The single client is measured against ``generate`` as well, request by request in
turns: the same prompt, the same tokens.

    python benchmarks/serve.py [--bundle DIR] [--rounds 3] [-o benchmarks/serve.json] [--readme README.md]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx2
import readme_tables

import pe_onnx
from pe_onnx.machine import describe_machine, versions

PROMPT_CHARACTERS, NEW_TOKENS = 24, 64
FEWEST_REQUESTS = 4
"""Of a round: enough that the single client is measured, few enough that a round is short."""
OVERHEAD_TOKENS = 256
OVERHEAD_PAIRS = 12
MOST_REUSED = 0.05
"""Of prompts' tokens: texts drawn at random begin alike now and then."""


@contextmanager
def served(bundle: Path, slots: int) -> Iterator[str]:
    """The address of a ``pe-onnx serve`` in a process of its own."""
    code = "from pe_onnx.cli import main; main()"
    options = ("--port", "0", "--slots", str(slots), "--max-length", "1024", "--name", "m", "--max-queue", "256")
    environment = {key: value for key, value in os.environ.items() if key != "PE_ONNX_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(bundle), *options], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        yield next(found[1] for line in process.stderr if (found := re.search(r" at (\S+)/v1,", line)))
    finally:
        process.terminate()
        process.wait()


def prompts(seed: int) -> Iterator[str]:
    """Texts that share no beginning."""
    rng = random.Random(seed)
    while True:
        yield "".join(rng.choices(string.ascii_letters + " ", k=PROMPT_CHARACTERS))


def body(prompt: str, tokens: int, stream: bool) -> dict[str, Any]:
    asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {**asked, "stream": stream}


async def load(address: str, clients: int, requests: int, seed: int, stream: bool) -> dict[str, float]:
    """Requests by so many clients at once: tokens/s over all, seconds to the first token and of a request."""
    first_s, whole_s = [], []
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=300) as http:

        async def client(number: int) -> None:
            texts = prompts(1000 * seed + number)
            for _ in range(requests):
                begin = time.perf_counter()
                asked = body(next(texts), NEW_TOKENS, stream)
                async with http.stream("POST", "/v1/completions", json=asked) as answer:
                    answer.raise_for_status()
                    first = None
                    async for _ in answer.aiter_raw():
                        first = first or time.perf_counter()
                first_s.append((first or 0.0) - begin)
                whole_s.append(time.perf_counter() - begin)

        begin = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        elapsed = time.perf_counter() - begin
    return {
        "tokens_per_s": clients * requests * NEW_TOKENS / elapsed,
        "first_token_s": statistics.median(first_s),
        "request_s": statistics.median(whole_s),
    }


def reused_share(address: str) -> float:
    """Of all prompt tokens those that a slot held already."""
    text = httpx2.get(f"{address}/metrics").text
    reused, prompts = (
        float(re.findall(rf"^pe_onnx_{name}_tokens_total (\S+)$", text, re.MULTILINE)[0])
        for name in ("reused", "prompt")
    )
    return reused / prompts


def overhead(address: str, model: Any) -> dict[str, float]:
    """One request over HTTP and one by ``generate``, in turns; medians in seconds, and their ratio."""
    times: dict[str, list[float]] = {"serve": [], "generate": []}
    texts = prompts(7)
    with httpx2.Client(base_url=address, timeout=300) as http:
        for pair in range(OVERHEAD_PAIRS + 1):
            prompt = next(texts)
            begin = time.perf_counter()
            expected = model.generate(prompt, OVERHEAD_TOKENS, ignore_eos=True, max_length=1024)
            middle = time.perf_counter()
            answer = http.post("/v1/completions", json=body(prompt, OVERHEAD_TOKENS, False)).json()
            end = time.perf_counter()
            if answer["choices"][0]["text"] != expected.text:
                raise SystemExit("the server's answer is not that of generate")
            if pair:  # the first warms both
                times["generate"].append(middle - begin)
                times["serve"].append(end - middle)
    ratios = [a / b for a, b in zip(times["serve"], times["generate"], strict=True)]
    medians = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| clients | tokens/s | streaming | first token, ms | request, s |", "|---:|---:|---:|---:|---:|"]
    for clients, one in result["clients"].items():
        plain, streamed = one["whole"], one["stream"]
        lines.append(
            f"| {clients} | {plain['tokens_per_s']:,.0f} ({plain['gain']:.2f}) | {streamed['tokens_per_s']:,.0f} "
            f"({streamed['gain']:.2f}) | {1000 * streamed['first_token_s']:,.0f} | {plain['request_s']:.2f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="What to serve. [rope, preset small]")
@click.option("--clients", default="1,4,16,64", show_default=True)
@click.option("--slots", default=16, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path))
def main(bundle: Path | None, clients: str, slots: int, rounds: int, output: Path, readme: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder, "bundle")
            config = {"tie_word_embeddings": False}
            pe_onnx.export(encoding="rope", preset="small", config=config, output=bundle)
        counts = [int(part) for part in clients.split(",")]
        measured: dict[int, dict[str, list[dict[str, float]]]] = {n: {"whole": [], "stream": []} for n in counts}
        seeds = itertools.count()
        with served(bundle, slots) as address:
            asyncio.run(load(address, max(counts), 1, 99, False))  # slots and bindings are made
            for _ in range(rounds):
                for n in counts:
                    for kind, found in measured[n].items():
                        few = -(-FEWEST_REQUESTS // n)
                        found.append(asyncio.run(load(address, n, few, next(seeds), kind == "stream")))
                        alone = measured[counts[0]][kind][-1]
                        found[-1]["gain"] = found[-1]["tokens_per_s"] / alone["tokens_per_s"]
                        click.echo(f"{n} clients, {kind}: {found[-1]['tokens_per_s']:.0f} tokens/s", err=True)
            held = reused_share(address)
            if held > MOST_REUSED:
                raise SystemExit(f"{held:.0%} of the prompts' tokens were held from others")
            beside = overhead(address, pe_onnx.load(bundle))
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions(("pe-onnx", "onnxruntime", "numpy", "fastapi", "uvicorn")),
        "prompt_characters": PROMPT_CHARACTERS,
        "new_tokens": NEW_TOKENS,
        "slots": slots,
        "clients": {
            str(n): {
                kind: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                for kind, runs in kinds.items()
            }
            for n, kinds in measured.items()
        },
        "beside_generate": beside,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    text = table(result)
    click.echo(text)
    click.echo(f"one client, beside generate: {beside['ratio']:.3f}")
    if readme is not None:
        readme_tables.write(readme, "serve", text)


if __name__ == "__main__":
    main()
