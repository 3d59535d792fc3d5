"""What a request takes of memory is known before it runs, and held to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pe_onnx
from pe_onnx import memory_plan
from pe_onnx.cli._options import parse_bytes
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import InPlaceCache

Bundles = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, 3000).tolist()
MB = 10**6


def chunks(cache: InPlaceCache, prompt: list[int]) -> list[int]:
    cache.feeds = []
    cache.prefill([prompt])
    return [feed.valid.shape[1] for feed in cache.feeds]


def test_chunks_shrink_until_they_fit(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same; below the fewest tokens of a chunk it is refused, with what would fit."""
    monkeypatch.setattr(memory_plan, "status_bytes", lambda field: 100 * MB - memory_plan.OVERHEAD_BYTES)
    model = pe_onnx.load(bundles("t5_bias"))
    whole = model.generate(TOKENS[:2000], 5).tokens
    sizes = set()
    cache = model.cache()
    for chunk in (256, 64, 16):
        needed = 100 * MB + memory_plan.demand(model.session, 1, 2000, 2004, chunk).total
        assert model.generate(TOKENS[:2000], 5, max_memory_bytes=needed).tokens == whole
        cache = model.cache()
        memory_plan.make_room(cache, 2000, 5, needed)
        assert cache.chunk_tokens == chunk
        assert cache.capacity == 2004, "exactly what is needed"
        sizes.add(max(chunks(cache, TOKENS[:2000])))
    assert sizes == {256, 64, 16}
    with pytest.raises(InputError, match=r"1 x 2004 tokens take about .* would fit") as caught:
        model.generate(TOKENS[:2000], 5, max_memory_bytes=needed - MB // 2)
    fitting = int(str(caught.value).split("1 x ")[2].split()[0])
    assert 100 < fitting < 2004
    left = needed - MB // 2 - 100 * MB
    assert memory_plan.demand(model.session, 1, fitting, fitting, 16).total <= left
    assert memory_plan.demand(model.session, 1, fitting + 1, fitting + 1, 16).total > left


def test_where_a_prompt_is_one_run_it_fits_or_not(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "status_bytes", lambda field: None)
    model = pe_onnx.load(bundles("rope_dynamic", config={"max_position_embeddings": 64}))
    weights = model.bundle.manifest["graph"]["weight_bytes"] + memory_plan.OVERHEAD_BYTES
    needed = weights + memory_plan.demand(model.session, 2, 90, 94, 90).total
    prompts = [TOKENS[:90], TOKENS[5:20]]
    made = model.generate(prompts, 5, max_length=200, max_memory_bytes=needed)
    assert [r.tokens for r in made] == [r.tokens for r in model.generate(prompts, 5, max_length=200)]
    with pytest.raises(InputError, match="2 x 94 tokens take"):
        model.generate(prompts, 5, max_length=200, max_memory_bytes=needed - 1)


RUN = """
import json, sys
import numpy as np
import pe_onnx
from pe_onnx.fresh_process import status_bytes
folder, tokens, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = pe_onnx.load(folder, threads=1)
loaded = status_bytes("VmRSS")
model.generate(np.random.default_rng(0).integers(0, 256, tokens).tolist(), 2, max_length=tokens + 8,
               max_memory_bytes=loaded + budget)
print(json.dumps([loaded, status_bytes("VmHWM")]))
"""


@pytest.mark.parametrize(("encoding", "target"), [("rope", "ort"), ("alibi", "ort"), ("alibi", "portable")])
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is Linux's")
def test_a_process_keeps_to_its_budget(bundles: Bundles, encoding: str, target: str) -> None:
    """One that chunks of 256 tokens would exceed where there are scores; and the plan grows with the length alone."""
    model, tokens = pe_onnx.load(bundles(encoding, target)), 4000
    budget = memory_plan.demand(model.session, 1, tokens, tokens + 1, 32).total + memory_plan.OVERHEAD_BYTES + 4 * MB
    command = [sys.executable, "-c", RUN, str(model.bundle.folder), str(tokens), str(budget)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    loaded, peak = json.loads(result.stdout)
    assert peak <= loaded + budget
    at_8k, at_16k, at_32k = (memory_plan.demand(model.session, 1, n, n, 256).total for n in (8192, 16384, 32768))
    assert at_32k - at_16k < 2.1 * (at_16k - at_8k)


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MB", 512 * MB), ("1.5 gb", 1500 * MB), ("2GiB", 2 << 30), ("64kB", 64000), ("7", 7), ("1MiB", 1 << 20)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--max-memory") == count


@pytest.mark.parametrize("text", ["", "0", "-1MB", "5 apples", "MB", "0.1", "1e9", "9" * 13, "NaN"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-memory = .* must be a size above 0, as in 512MB or 2GiB"):
        parse_bytes(text, "--max-memory")


def test_the_command_line(cli: Callable, bundles: Bundles) -> None:
    args = ("generate", bundles("rope"), "hello", "-n", 5)
    plain = cli(*args)
    assert cli(*args, "--max-memory", "4GB").stdout == plain.stdout != ""
    refused = cli(*args, "--max-memory", "1MB")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "1 x 0 tokens, prompt and new ones, would fit" in refused.stderr
    assert refused.stderr.count("\n") == 1
    wrong = cli(*args, "--max-memory", "much")
    assert (wrong.returncode, "--max-memory = 'much' must be a size" in wrong.stderr) == (2, True)
