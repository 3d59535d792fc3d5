"""Prompts of a T5 decoder and its encoder for ``t5.py``: time in turns, memory as the peak of a process of its own.

transformers runs a prompt whole, ours in chunks, as either does by itself. Our encoder's peak has the decoder's
weights and the cross cache in it, and none of PyTorch: this file imports it where transformers runs.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from memory import status_bytes

Clock = Callable[[], float]

OURS, ROTATED, EAGER, STOCK_GRAPH = "T5 bias", "RoPE", "transformers", "stock export"
SOURCE_TOKENS = 128
ROOM = 64


def _tokens(count: int) -> list[int]:
    return np.random.default_rng(0).integers(2, 32128, count).tolist()


def our_prompt(folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], float]:
    """A call that fills a new cache, and gives the seconds of that; the source is encoded before."""
    import pe_onnx

    model = pe_onnx.load(folder, threads=threads, verify=False)

    def run() -> float:
        cache = model.cache(max_length=tokens + ROOM, sources=[_tokens(SOURCE_TOKENS)])
        cache.reserve(tokens)
        begin = clock()
        cache.prefill([_tokens(tokens)])
        return clock() - begin

    return run


def their_prompt(folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], float]:
    import torch
    from transformers import T5ForConditionalGeneration

    if threads:
        torch.set_num_threads(threads)
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()

    @torch.no_grad()
    def run() -> float:
        hidden = model.get_encoder()(input_ids=torch.tensor([_tokens(SOURCE_TOKENS)])).last_hidden_state
        begin = clock()
        decoded = model.get_decoder()(
            input_ids=torch.tensor([_tokens(tokens)]), encoder_hidden_states=hidden, use_cache=True
        )
        model.lm_head(decoded.last_hidden_state[:, -1])
        return clock() - begin

    return run


def our_encoder(folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], float]:
    """The encoder's session alone, its output bound as the cache of a source binds it."""
    import pe_onnx
    from pe_onnx.sources import Sources

    model = pe_onnx.load(folder, threads=threads, verify=False)
    assert model.encoder is not None
    encoder = model.encoder

    def run() -> float:
        begin = clock()
        Sources(encoder, model.session, [_tokens(tokens)])
        return clock() - begin

    return run


def their_encoder(folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], float]:
    import torch
    from transformers import T5ForConditionalGeneration

    if threads:
        torch.set_num_threads(threads)
    encoder = T5ForConditionalGeneration.from_pretrained(folder).eval().get_encoder()

    @torch.no_grad()
    def run() -> float:
        ids = torch.tensor([_tokens(tokens)])
        begin = clock()
        encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
        return clock() - begin

    return run


def _peak(make: Callable[..., Callable[[], float]], *args: Any) -> tuple[float, int]:
    """Seconds of one run, and the peak bytes of its process."""
    seconds = make(*args)()
    return seconds, status_bytes("VmHWM")


def alone(make: Callable[..., Callable[[], float]], *args: Any) -> tuple[float, int]:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, make, *args).result()


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds, contestants in turn, each first in its turn; one turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in list(runs)[:: 1 if repeat % 2 else -1]:
            seconds = runs[name]()
            if repeat:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    folder: Path, prompt: int, sources: Sequence[int], repeats: int, threads: int, clock: Clock
) -> dict[str, Any]:
    """What stands in ``t5.json`` of prompts and encoder. transformers runs the longest input once, alone."""
    checkpoint = folder / "checkpoint"
    click.echo(f"prompt of {prompt} tokens", err=True)
    peaks = {name: alone(our_prompt, folder / name, prompt, threads, clock)[1] for name in (OURS, ROTATED)}
    seconds = interleaved({name: our_prompt(folder / name, prompt, threads, clock) for name in peaks}, repeats)
    seconds[EAGER], peaks[EAGER] = alone(their_prompt, checkpoint, prompt, threads, clock)
    encoder: dict[int, dict[str, dict[str, float]]] = {}
    for tokens in sources:
        click.echo(f"encoder on {tokens} tokens", err=True)
        ours, theirs = (
            alone(our_encoder, folder / OURS, tokens, threads, clock),
            alone(their_encoder, checkpoint, tokens, threads, clock),
        )
        times = {EAGER: theirs[0]}
        runs = {OURS: our_encoder(folder / OURS, tokens, threads, clock)}
        if tokens < max(sources):
            runs[EAGER] = their_encoder(checkpoint, tokens, threads, clock)
        times.update(interleaved(runs, repeats))
        encoder[tokens] = {
            "ms": {name: 1000 * times[name] for name in (OURS, EAGER)},
            "peak_bytes": {OURS: ours[1], EAGER: theirs[1]},
        }
    return {
        "prefill": {
            "tokens": prompt,
            "tokens_per_s": {name: prompt / value for name, value in seconds.items()},
            "peak_bytes": peaks,
            "time_ratio_to_rope": seconds[OURS] / seconds[ROTATED],
            "peak_ratio_to_rope": peaks[OURS] / peaks[ROTATED],
        },
        "encoder": encoder,
    }


def summary(measured: dict[str, Any]) -> str:
    prompt = measured["prefill"]
    return (
        f"\na prompt of {prompt['tokens']:,} tokens takes {prompt['time_ratio_to_rope']:.2f} of the time with RoPE, "
        f"and its peak is {prompt['peak_ratio_to_rope']:.2f} of that with RoPE"
    )
