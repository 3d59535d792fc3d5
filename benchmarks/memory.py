"""Memory: peak of an 8192-token prefill by encoding as a ratio to RoPE, and what a decode step allocates.

Each prefill runs in a process of its own, whose greatest resident size the system reports (Linux's VmHWM;
getrusage would count the parent's size before exec as the child's). For the decode step a
cache's buffers are touched first, and what the process grows by over the steps is set against the cache's bytes.

    python benchmarks/memory.py [--tokens 8192] [-o benchmarks/memory.json]
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path

import click
import numpy as np

ENCODINGS = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi")
BASELINE = "rope"


def status_bytes(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the greatest it has been, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def prefill_peak(folder: str, tokens: int) -> int:
    """Peak bytes of a process that fills a cache of ``tokens`` tokens in chunks."""
    import pe_onnx

    model = pe_onnx.load(folder)
    cache = model.cache(1, tokens)
    cache.reserve(tokens)
    cache.prefill([np.random.default_rng(0).integers(0, 256, tokens).tolist()])
    return status_bytes("VmHWM")


def decode_growth(folder: str, tokens: int, steps: int) -> tuple[int, int]:
    """Bytes by which the peak grows over ``steps`` decode steps in a touched cache, and the cache's bytes."""
    import pe_onnx
    from pe_onnx.kv_cache import InPlaceCache

    cache = pe_onnx.load(folder).cache(1, tokens)
    assert isinstance(cache, InPlaceCache)
    cache.reserve(tokens)
    for buffer in cache.buffers:
        buffer.host[...] = 0.5
    cache.lengths[:] = tokens // 2
    cache.decode([7])  # the first step sets up onnxruntime's arena
    before = status_bytes("VmHWM")
    for _ in range(steps):
        cache.decode([7])
    return status_bytes("VmHWM") - before, cache.nbytes


@click.command()
@click.option("--tokens", default=8192, show_default=True, help="Tokens of the prompt and of the cache.")
@click.option("--preset", default="small", show_default=True)
@click.option("--steps", default=64, show_default=True, help="Decode steps.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(tokens: int, preset: str, steps: int, output: Path) -> None:
    """Measure the six encodings."""
    import pe_onnx

    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in ENCODINGS:
            pe_onnx.export(encoding=name, preset=preset, output=Path(folder, name))
        peaks = {}
        for name in ENCODINGS:
            with processes.Pool(1) as pool:
                peaks[name] = pool.apply(prefill_peak, (str(Path(folder, name)), tokens))
        with processes.Pool(1) as pool:
            growth, cache_bytes = pool.apply(decode_growth, (str(Path(folder, BASELINE)), tokens, steps))
    result = {
        "preset": preset,
        "tokens": tokens,
        "prefill_peak_bytes": peaks,
        "ratio_to_rope": {name: peak / peaks[BASELINE] for name, peak in peaks.items()},
        "decode_steps": steps,
        "decode_growth_bytes": growth,
        "cache_bytes": cache_bytes,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"| prefill of {tokens:,} tokens | peak MB | ratio to `{BASELINE}` |\n|---|---:|---:|")
    for name, peak in peaks.items():
        click.echo(f"| `{name}` | {peak / 1e6:,.0f} | {peak / peaks[BASELINE]:.2f} |")
    click.echo(
        f"\n{steps} decode steps grow the process by {growth / 1e6:.1f} MB; the cache has {cache_bytes / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
