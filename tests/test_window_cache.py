"""Layers with a sliding window that keep the window alone, against transformers on the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from tiny_models import WINDOW

import pe_onnx
from pe_onnx import kv_cache
from pe_onnx.cached_rows import Array
from pe_onnx.errors import CacheFileError, ConfigError, InputError
from pe_onnx.generate import Model
from pe_onnx.kv_cache import InPlaceCache

SLACK = 7
"""Slots beyond the window: so few that it is moved to the front every few tokens, and what was there is overwritten."""
SLOTS = WINDOW + SLACK
TOKENS = np.random.default_rng(0).integers(3, checkpoints.VOCAB, 5 * WINDOW).tolist()
FAMILIES = ("mistral", "gemma2")
"""All layers have the window; one of two has."""


@pytest.fixture(autouse=True)
def little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "WINDOW_SLACK", SLACK)


class Pair:
    """A bundle whose windows are cut, and transformers' model."""

    def __init__(self, folder: Path, family: str) -> None:
        checkpoint = checkpoints.write(folder / "c", family, sliding_window=WINDOW)
        pe_onnx.export(checkpoint, folder / "b", window_cache=True)
        self.model: Model = pe_onnx.load(folder / "b")
        self.oracle: Any = checkpoints.oracle(checkpoint)

    @torch.no_grad()
    def expected(self, row: list[int]) -> Array:
        return self.oracle(torch.tensor([row])).logits[0].numpy()

    def cache(self, rows: int = 1, **options: int) -> InPlaceCache:
        cache = self.model.cache(rows, max_length=400, **options)
        assert isinstance(cache, InPlaceCache)
        return cache


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = Pair(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_far_past_the_window(pairs: Callable[[str], Pair], family: str) -> None:
    """Prompts in chunks, decode steps while some rows rest, more of a prompt on a full window."""
    pair = pairs(family)
    cache = pair.cache(3, chunk_tokens=13)
    windows = cache.session.bundle.windows
    assert windows == ([WINDOW, WINDOW] if family == "mistral" else [WINDOW, 0])
    rows = [TOKENS[: SLOTS - 1], TOKENS[7:8], TOKENS[5 : 5 + 4 * WINDOW]]

    def same(logits: Any, who: Any = range(3)) -> None:
        for b in who:
            np.testing.assert_allclose(logits[b], pair.expected(rows[b])[-1], atol=3e-4)

    same(cache.prefill(rows))
    for step in range(40):
        moving = np.array([True, step % 3 == 0, step > 25])
        rows = [[*row, 9 + step] if moves else row for row, moves in zip(rows, moving, strict=True)]
        same(cache.decode([9 + step] * 3, moving), np.flatnonzero(moving))
    rows = [row + TOKENS[:n] for row, n in zip(rows, (1, SLOTS + 3, 17), strict=True)]
    same(cache.prefill([row[-n:] for row, n in zip(rows, (1, SLOTS + 3, 17), strict=True)]))
    assert cache.tokens == rows
    for layer, window in enumerate(windows):
        assert cache.buffers[2 * layer].shape[2] == (SLOTS if window else cache.capacity)
    addresses = [buffer.address for buffer in cache.buffers]
    cache.reserve(3 * cache.capacity)
    assert [a == buffer.address for a, buffer in zip(addresses, cache.buffers, strict=True)] == [
        window > 0 for window in windows for _ in range(2)
    ]
    rows = [[*row, token] for row, token in zip(rows, (3, 4, 5), strict=True)]
    same(cache.decode([3, 4, 5]))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_copies_of_rows(pairs: Callable[[str], Pair], family: str) -> None:
    """Rows become others, of the same length or not, before and after the window has moved."""
    pair = pairs(family)
    cache = pair.cache(2)
    rows = [TOKENS[: 3 * WINDOW], TOKENS[: 2 * WINDOW] + TOKENS[10 : 10 + WINDOW]]
    cache.prefill(rows)
    cache.expand(2)
    rows = [list(row) for row in (rows[0], rows[0], rows[1], rows[1])]
    rng = np.random.default_rng(1)
    for step in range(25):
        active = np.array([True, step < 9, step % 2 == 0, True])
        tokens = rng.integers(3, checkpoints.VOCAB, 4)
        cache.decode(tokens, active)
        rows = [[*row, int(t)] if a else row for row, t, a in zip(rows, tokens, active, strict=True)]
        parents = rng.integers(0, 4, 4)
        cache.reorder(parents)
        rows = [list(rows[p]) for p in parents]
        assert cache.tokens == rows
    logits = cache.decode([5, 6, 7, 8])
    for b, row in enumerate(rows):
        np.testing.assert_allclose(logits[b], pair.expected([*row, 5 + b])[-1], atol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_back_and_to_a_file(pairs: Callable[[str], Pair], family: str, tmp_path: Path) -> None:
    """As far back as the window is held; further back a prompt is computed again, and truncate refuses."""
    pair = pairs(family)
    back = refused = 0
    for held in range(SLOTS - 1, SLOTS + 2 * SLACK + 3):
        for kept in (held - 1, held - 3, held - 6, WINDOW // 2):
            cache = pair.cache(chunk_tokens=16)
            cache.prefill([TOKENS[:held]])
            rest = TOKENS[held : held + 3]
            if cache._can_keep(0, kept):
                cache.truncate([kept])
                back += 1
            else:
                with pytest.raises(InputError, match="out of the window"):
                    cache.truncate([kept])
                refused += 1
                (rest_of_prompt,) = cache.reuse([TOKENS[:kept] + rest])
                assert rest_of_prompt.size == kept + 3
                kept, rest = 0, rest_of_prompt.tolist()
            if kept % 2:
                cache.save(tmp_path / "c")
                cache = pair.model.load_cache(tmp_path / "c", max_length=400)
            row = TOKENS[:kept] + rest
            np.testing.assert_allclose(cache.prefill([rest])[0], pair.expected(row)[-1], atol=3e-4)
            for token in TOKENS[:1]:
                row.append(token)
                np.testing.assert_allclose(cache.decode([token])[0], pair.expected(row)[-1], atol=3e-4)
    assert back > 20
    assert refused > 10


def test_a_file_holds_the_window_alone(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    cache = pairs("mistral").cache()
    cache.prefill([TOKENS])
    cache.save(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    held = header["0.past_key_values.0.key"]["shape"][1]
    assert WINDOW <= held <= SLOTS < len(TOKENS)
    short = {**header, "0.past_key_values.0.key": {**header["0.past_key_values.0.key"], "shape": [2, WINDOW - 1, 16]}}
    text = json.dumps(short, separators=(",", ":")).encode()
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + len(json.dumps(header)) :])
    with pytest.raises(CacheFileError, match="tensors are not those"):
        pairs("mistral").model.load_cache(tmp_path / "c")


def test_a_conversation_past_the_window_computes_each_token_once(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("mistral")
    cache = pair.cache()
    history: list[int] = []
    counted = 0
    for turn in range(10):
        history += TOKENS[turn : turn + 9]
        result = pair.model.generate(history, 6, cache=cache, reuse=True, ignore_eos=True)
        counted += pair.model.timing.computed_tokens
        assert result.tokens == pair.model.generate(history, 6, max_length=400, ignore_eos=True).tokens
        history += result.tokens
    assert counted == len(history) - 1 > 4 * WINDOW


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window_cache = True is for target ort"):
        pe_onnx.export(encoding="rope", output=tmp_path / "b", target="portable", window_cache=True)
    with pytest.raises(ConfigError, match="no layer of this model has a sliding window"):
        pe_onnx.export(encoding="rope", output=tmp_path / "b", window_cache=True, verify=False)
    assert list(tmp_path.iterdir()) == []
