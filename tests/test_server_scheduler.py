"""Requests that join and leave a batch: each gets the tokens that it gets alone, whatever runs beside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import pe_onnx
from pe_onnx import sampling
from pe_onnx.errors import BundleError
from pe_onnx.generate import Model
from pe_onnx.server import scheduler as scheduler_module
from pe_onnx.server.scheduler import Event, Scheduler, Work
from pe_onnx.server.slots import Slots

Bundles = Callable[..., Path]
UNTIED = {"tie_word_embeddings": False}
GREEDY = sampling.SamplingOptions()


@dataclass
class Server:
    """A scheduler and what it delivered."""

    model: Model
    rows: int = 4
    max_length: int = 200
    events: dict[Work, list[Event]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.slots = Slots(self.model.session, self.rows, self.max_length)
        self.scheduler = Scheduler(self.slots, lambda work, event: self.events[work].append(event))

    def ask(self, prompt: list[int], new: int = 12, options: sampling.SamplingOptions = GREEDY, **more: object) -> Work:
        work = Work(prompt, new, sampling.Sampler(options, 1), **more)  # type: ignore[arg-type]
        self.scheduler.submit(work)
        return work

    def finish(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                return
            self.scheduler.step()
        raise AssertionError("requests never end")

    def tokens(self, work: Work) -> list[int]:
        return [event.token for event in self.events[work] if event.token is not None]

    def end(self, work: Work) -> str | None:
        return self.events[work][-1].finish


@pytest.fixture(scope="module")
def rope(bundles: Bundles) -> Model:
    return pe_onnx.load(bundles("rope", "ort", preset="tiny", config=UNTIED))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("windowed")
    checkpoint = checkpoints.write(folder / "c", "mistral", sliding_window=24)
    pe_onnx.export(checkpoint, folder / "b", window_cache=True)
    return pe_onnx.load(folder / "b")


def prompts(model: Model, count: int, longest: int, seed: int = 0) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.integers(0, model.bundle.shape["vocab_size"], int(rng.integers(1, longest))).tolist()


def alone(model: Model, prompt: list[int], new: int, options: sampling.SamplingOptions = GREEDY) -> list[int]:
    tokens: list[int] = model.generate(prompt, new, options, max_length=model.bundle.max_length or 200).tokens
    return tokens


ENCODINGS = ("rope", "t5_bias", "alibi", "learned", "none", "rope_dynamic", "sinusoidal", "rope_longrope")
FAST = ENCODINGS[:3]


@pytest.mark.parametrize("encoding", [pytest.param(e, marks=() if e in FAST else pytest.mark.slow) for e in ENCODINGS])
def test_each_answer_is_that_given_alone(encoding: str, bundles: Bundles) -> None:
    """Requests come in the middle of others, more than there are rows, of all lengths; some share beginnings."""
    config = {**UNTIED, "max_position_embeddings": 128}
    model = pe_onnx.load(bundles(encoding, "ort", preset="tiny", config=config))
    server, works, rng = (
        Server(model, max_length=min(200, model.bundle.max_length or 200)),
        [],
        np.random.default_rng(1),
    )
    length = 100 if model.bundle.max_length else 160
    asked = [*prompts(model, 14, length), *([7] * 30 + p[:20] for p in prompts(model, 6, length))]
    for prompt in asked:
        works.append(server.ask(prompt, int(rng.integers(1, 24))))
        for _ in range(rng.integers(0, 5)):
            server.scheduler.step()
    server.finish()
    for work in works:
        assert server.tokens(work) == alone(model, work.prompt, work.max_new_tokens), len(work.prompt)
        assert server.end(work) == "length"
    assert len({tuple(server.tokens(work)) for work in works}) > len(works) // 2
    reused = sum(work.reused_tokens for work in works)
    assert (reused == 0) == model.bundle.path_dependent, reused


def test_rows_of_a_window_share_a_run(windowed: Model) -> None:
    server = Server(windowed)
    works = [server.ask(prompt, 40) for prompt in prompts(windowed, 9, 70)]
    server.finish()
    for work in works:
        assert server.tokens(work) == alone(windowed, work.prompt, 40)


def test_a_draw_depends_on_the_seed_alone(rope: Model) -> None:
    options = sampling.SamplingOptions(temperature=1.5, top_k=50, repetition_penalty=1.2, seed=3)
    server = Server(rope)
    works = [server.ask(prompt, 10, options) for prompt in prompts(rope, 6, 20)]
    server.finish()
    for work in works:
        assert server.tokens(work) == alone(rope, work.prompt, 10, options)


def test_the_twin_a_row_too_far_gives_other_tokens(rope: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With positions that are off by one for all rows but the longest the comparison above fails."""
    step_rows = Slots._step_rows

    def shifted(self, row, ids, positions, lengths, moving):  # type: ignore[no-untyped-def]
        return step_rows(self, row, ids, np.full_like(positions, positions.max()), lengths, moving)

    monkeypatch.setattr(Slots, "_step_rows", shifted)
    server = Server(rope)
    works = [server.ask(prompt) for prompt in prompts(rope, 4, 60)]
    server.finish()
    assert any(server.tokens(work) != alone(rope, work.prompt, 12) for work in works)


def test_those_who_generate_wait_for_a_chunk_and_not_for_a_prompt(rope: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "CHUNK_TOKENS", 16)
    server = Server(rope)
    early = server.ask([1, 2, 3], 30)
    server.scheduler.step()
    late = server.ask(list(range(150)), 5)
    for _ in range(9):
        server.scheduler.step()
    assert len(server.tokens(early)) == 11
    assert server.tokens(late) == []
    server.finish()
    assert server.tokens(early) == alone(rope, early.prompt, 30)
    assert server.tokens(late) == alone(rope, late.prompt, 5)


def test_one_that_was_given_up_frees_its_row_before_the_next_step(rope: Model) -> None:
    server = Server(rope, rows=1)
    given_up, next_one = server.ask([1, 2], 100), server.ask([3, 4], 3)
    server.scheduler.step()
    assert server.scheduler.owners == [given_up]
    given_up.cancelled = True
    server.scheduler.step()
    assert server.scheduler.owners == [next_one]
    assert len(server.tokens(given_up)) == 2
    waiting = server.ask([5], 3)
    waiting.cancelled = True
    server.finish()
    assert server.tokens(waiting) == []
    assert server.tokens(next_one) == alone(rope, [3, 4], 3)


def test_a_request_out_of_time_ends(rope: Model) -> None:
    server = Server(rope, rows=1)
    running, waiting = (server.ask([1, 2], 100, deadline=time.monotonic() + 0.2) for _ in range(2))
    server.scheduler.step()
    time.sleep(0.25)
    server.scheduler.step()
    assert (server.end(running), server.end(waiting)) == ("timeout", "timeout")
    assert server.scheduler.idle


def test_a_conversation_computes_only_what_is_new(rope: Model) -> None:
    server = Server(rope)
    first = server.ask(list(range(100)), 8)
    other = server.ask([9] * 50, 8)
    server.finish()
    follow_up = [*first.prompt, *server.tokens(first), 5, 6, 7]
    second, third = server.ask(follow_up, 8), server.ask([*other.prompt, *server.tokens(other), 1], 8)
    server.finish()
    assert (second.reused_tokens, third.reused_tokens) == (107, 57)
    assert server.tokens(second) == alone(rope, follow_up, 8)
    assert server.tokens(third) == alone(rope, third.prompt, 8)


def test_a_beginning_is_copied_from_a_row_that_runs(rope: Model) -> None:
    """A system message that many requests share is computed once, while the first of them still runs."""
    server = Server(rope, rows=3)
    shared = list(range(120))
    works = [server.ask([*shared, 200 + i], 20) for i in range(3)]
    server.finish()
    assert [work.reused_tokens for work in works] == [0, 120, 120]
    for work in works:
        assert server.tokens(work) == alone(rope, work.prompt, 20)


def test_what_a_row_holds_is_kept_for_as_long_as_others_are_free(rope: Model) -> None:
    server = Server(rope, rows=3)
    kept = server.ask([1] * 40, 2)
    server.finish()
    for i in range(5):
        server.ask([50 + i] * 10, 2)
        server.finish()
        again = server.ask([1] * 40, 2)
        server.finish()
        assert again.reused_tokens == 39
        assert server.tokens(again) == server.tokens(kept)


def test_the_end_token_and_the_end_of_the_slot(rope: Model) -> None:
    server = Server(rope, max_length=30)
    expected = alone(rope, [1, 2, 3], 20)
    end = expected[6]
    stopped = server.ask([1, 2, 3], 20, ends=frozenset([end]))
    full = server.ask([1, 2, 3], 100)
    exact = server.ask(list(range(30)), 5)
    server.finish()
    assert server.tokens(stopped) == expected[: expected.index(end) + 1]
    assert server.end(stopped) == "stop"
    assert len(server.tokens(full)) == 28  # the token after the last that fits is still chosen
    assert server.tokens(full)[:20] == expected
    assert server.tokens(exact) == alone(rope, exact.prompt, 1)
    assert {server.end(full), server.end(exact)} == {"length"}


def test_likelihoods_are_those_of_the_logits(rope: Model) -> None:
    server = Server(rope)
    work = server.ask([1, 2, 3], 3, top_logprobs=4)
    server.finish()
    cache = rope.cache(1, 50)
    logits = cache.prefill([work.prompt])[0]
    for event in server.events[work]:
        values = logits.astype(np.float64)
        values -= np.log(np.exp(values - values.max()).sum()) + values.max()
        assert event.likelihoods is not None
        assert event.likelihoods.chosen == pytest.approx(values[event.token], abs=1e-4)
        assert [token for token, _ in event.likelihoods.top] == np.argsort(-values)[:4].tolist()
        assert [value for _, value in event.likelihoods.top] == pytest.approx(np.sort(values)[:-5:-1], abs=1e-4)
        logits = cache.decode([event.token or 0])[0]


def test_biases_and_penalties(rope: Model) -> None:
    server = Server(rope)
    plain = server.ask([1, 2, 3], 8)
    forced = server.ask([1, 2, 3], 8, bias={77: 100.0})
    penalised = server.ask([1, 2, 3], 60, presence_penalty=1.5, frequency_penalty=2.0, bias={77: 60.0})
    server.finish()
    assert server.tokens(forced) == [77] * 8
    assert 77 not in server.tokens(plain)
    drawn = server.tokens(penalised)
    assert drawn[:20] == [77] * 20  # 60 above the others, and 2 less each time
    assert len(set(drawn)) > 10


def test_a_run_that_fails_ends_its_requests_alone(rope: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(rope)
    good = server.ask([1, 2, 3], 12)
    server.scheduler.step()
    fill_row = Slots.fill_row

    def failing(self, row, tokens):  # type: ignore[no-untyped-def]
        if tokens[0] == 66:
            raise BundleError("onnxruntime cannot run it")
        return fill_row(self, row, tokens)

    monkeypatch.setattr(Slots, "fill_row", failing)
    bad, after = server.ask([66, 1], 5), server.ask([4, 5], 5)
    server.finish()
    assert (server.end(bad), server.events[bad][-1].message) == ("error", "onnxruntime cannot run it")
    assert server.tokens(good) == alone(rope, [1, 2, 3], 12)
    assert server.tokens(after) == alone(rope, [4, 5], 5)


def test_logits_that_are_no_numbers_end_their_request_alone(rope: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(rope)
    good, bad = server.ask([1, 2, 3], 6), server.ask([4, 5, 6], 6)
    server.scheduler.step()
    step = Slots.step
    row = bad.row

    def overflowing(self, first, tokens):  # type: ignore[no-untyped-def]
        logits = step(self, first, tokens)
        logits[row - first] = np.nan
        return logits

    monkeypatch.setattr(Slots, "step", overflowing)
    server.scheduler.step()
    monkeypatch.undo()
    server.finish()
    assert server.end(bad) == "error"
    assert "logit" in (server.events[bad][-1].message or "")
    assert server.tokens(good) == alone(rope, [1, 2, 3], 6)


def test_memory_of_slots_is_taken_once(rope: Model) -> None:
    server = Server(rope)
    addresses = [buffer.address for buffer in server.slots.buffers]
    for prompt in prompts(rope, 30, 150):
        server.ask(prompt, 20)
    server.finish()
    assert [buffer.address for buffer in server.slots.buffers] == addresses
