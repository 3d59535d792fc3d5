"""A cache that is given a whole prompt again computes only what is new of it, and is cut back where it departs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pe_onnx
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import KVCache

Bundles = Callable[..., Path]
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 900).tolist()
TARGETS = pytest.mark.parametrize("target", ["ort", "portable"])


def computed(cache: KVCache) -> int:
    """Tokens that the graph was run on, counted from what it was given."""
    assert cache.feeds is not None
    return sum(int(feed.valid.sum()) for feed in cache.feeds)


@pytest.mark.parametrize(("encoding", "target"), [("rope", "ort"), ("t5_bias", "portable")])
def test_a_conversation_computes_each_token_once(bundles: Bundles, encoding: str, target: str) -> None:
    """20 turns, the history whole in each; only the last token drawn is never run on."""
    model = pe_onnx.load(bundles(encoding, target))
    cache = model.cache(chunk_tokens=16)
    cache.feeds = []
    history: list[int] = []
    counted = 0
    for turn in range(20):
        history += TOKENS[31 * turn : 31 * turn + 1 + turn]
        result = model.generate(history, 7, cache=cache, reuse=True, ignore_eos=True)
        counted += model.timing.computed_tokens
        assert model.timing.reused_tokens == (0 if turn == 0 else len(history) - turn - 2)
        assert result.tokens == model.generate(history, 7, ignore_eos=True).tokens
        assert result.prompt_tokens == len(history)
        history += result.tokens
    assert computed(cache) == counted == len(history) - 1
    assert cache.tokens == [history[:-1]]


@pytest.mark.parametrize(("encoding", "target"), [("rope", "ort"), ("alibi", "ort"), ("alibi", "portable")])
def test_rows_of_a_batch_are_cut_back_each_where_it_departs(bundles: Bundles, encoding: str, target: str) -> None:
    """The same again, one shorter, one longer, one that departs, and one that has nothing in common."""
    model = pe_onnx.load(bundles(encoding, target))
    before = [TOKENS[:40], TOKENS[50:80], TOKENS[100:117], TOKENS[200:240], TOKENS[300:303]]
    after = [TOKENS[:40], TOKENS[50:60], TOKENS[100:140], [*TOKENS[200:220], 7, 7], TOKENS[400:409]]
    cache = model.cache(5)
    cache.prefill(before)
    cache.feeds = []
    results = model.generate(after, 9, cache=cache, reuse=True, ignore_eos=True)
    assert [r.tokens for r in results] == [model.generate(ids, 9, ignore_eos=True).tokens for ids in after]
    assert computed(cache) == (1 + 1 + 23 + 2 + 9) + 5 * 8
    assert cache.tokens == [ids + r.tokens[:-1] for ids, r in zip(after, results, strict=True)]


@TARGETS
def test_truncating_leaves_what_was_before(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("rope", target))
    cache = model.cache(2)
    cache.prefill([TOKENS[:60], TOKENS[100:133]])
    cache.truncate([17, 33])
    assert (cache.lengths.tolist(), cache.tokens) == ([17, 33], [TOKENS[:17], TOKENS[100:133]])
    logits = cache.decode([5, 6])
    for b, ids in enumerate(([*TOKENS[:17], 5], [*TOKENS[100:133], 6])):
        np.testing.assert_allclose(logits[b], model.cache().prefill([ids])[0], atol=1e-4)
    cache.truncate([0, 0])
    np.testing.assert_allclose(cache.prefill([[9], [8]])[1], model.cache().prefill([[8]])[0], atol=1e-4)


def test_where_keys_depend_on_their_run_all_is_computed_again(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope_dynamic", config={"max_position_embeddings": 64}))
    cache = model.cache(max_length=200)
    for n in (40, 50, 90, 120):
        result = model.generate(TOKENS[:n], 12, cache=cache, reuse=True, ignore_eos=True)
        assert result.tokens == model.generate(TOKENS[:n], 12, max_length=200, ignore_eos=True).tokens
        assert model.timing.reused_tokens == 0
    with pytest.raises(InputError, match="row 0 cannot go back from 131 tokens to 100"):
        cache.truncate([100])
    cache.truncate([131])
    cache.truncate([0])


def test_what_reuse_and_truncate_refuse(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache(2)
    cache.prefill([[1, 2, 3], [4, 5]])
    for lengths in ([1], [1, 3], [-1, 0], [[1, 1]]):
        with pytest.raises(InputError, match="must be one a row"):
            cache.truncate(lengths)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 prompts for a cache of 2 rows"):
        model.generate([1, 2, 3], 2, cache=cache, reuse=True)
    for prompts, message in (([[1], []], "no tokens"), ([[1], [999]], "token id 999"), ([[1], [1] * 3000], "3000")):
        with pytest.raises(InputError, match=message):
            cache.reuse(prompts)
    assert cache.lengths.tolist() == [3, 2], "as it was"
    with pytest.raises(ConfigError, match="reuse = True needs a cache"):
        model.generate([1], 2, reuse=True)
    cache.path = []
    with pytest.raises(ConfigError, match="noted in a path"):
        cache.truncate([1, 1])


CHAT = """
import builtins, json, sys
from pe_onnx.cli import generate, main
def tokens(model, messages):
    return model.tokenizer.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")
generate._chat_tokens = tokens  # the tiny bundles have no template
sys.stdin.isatty = lambda: True
lines = iter(json.loads(sys.argv.pop()))
def ask(prompt):
    try:
        return next(lines)
    except StopIteration:
        raise EOFError
builtins.input = ask
main()
"""


def test_a_chat_goes_on_from_what_it_holds(bundles: Bundles, tmp_path: Path) -> None:
    """On the command line, with an answer that is one character of text: also over a file, in a second process."""
    command = [sys.executable, "-c", CHAT, "generate", str(bundles("rope")), "--chat", "-n", "1", "--save-cache", "c"]

    def chat(*options: str, lines: str) -> list[str]:
        result = subprocess.run([*command, *options, lines], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return [line for line in result.stderr.splitlines() if line.startswith("[")]

    first, second = chat(lines='["hello there", "and then?"]')
    assert "held" not in first
    prompt, held = int(second.split()[0][1:]), int(second.split()[3])
    assert int(first.split()[0][1:]) <= held < prompt
    (again,) = chat("--load-cache", "c", lines='["hello there"]')
    assert f"{first.split()[0]} prompt tokens, {int(first.split()[0][1:]) - 1} of them held" in again
