"""The engine's thread: whoever asked is told how it ended, whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pe_onnx
from pe_onnx.generate import Model
from pe_onnx.sampling import Sampler, SamplingOptions
from pe_onnx.server.engine import ClosedError, Engine, QueueFullError
from pe_onnx.server.scheduler import Event, Scheduler, Work
from pe_onnx.server.slots import Slots

Bundles = Callable[..., Path]


class Asker:
    """An engine, and who waits for its events."""

    def __init__(self, model: Model, rows: int = 2, max_queue: int = 3) -> None:
        self.engine = Engine(Slots(model.session, rows, 2000), max_queue)
        self.events: dict[Work, list[Event]] = {}
        self.told = threading.Condition()
        self.engine.start(self._publish)

    def _publish(self, events: list[tuple[Work, Event]]) -> None:
        with self.told:
            for work, event in events:
                self.events.setdefault(work, []).append(event)
            self.told.notify_all()

    def ask(self, new: int = 1500) -> Work:
        work = Work([1, 2, 3], new, Sampler(SamplingOptions(), 1))
        self.engine.submit([work])
        return work

    def end(self, work: Work, seconds: float = 30) -> str | None:
        def ended() -> bool:
            return bool(self.events.get(work)) and self.events[work][-1].finish is not None

        with self.told:
            assert self.told.wait_for(ended, seconds), "nobody was told"
            return self.events[work][-1].finish


@pytest.fixture(scope="module")
def model(bundles: Bundles) -> Model:
    return pe_onnx.load(bundles("rope", "ort", preset="tiny", config={"tie_word_embeddings": False}))


@pytest.fixture
def asker(model: Model) -> Iterator[Asker]:
    made = Asker(model)
    yield made
    made.engine.close()


def test_closing_tells_everybody(asker: Asker) -> None:
    works = [asker.ask() for _ in range(5)]
    time.sleep(0.05)
    asker.engine.close()
    assert [asker.end(work) for work in works] == ["closed"] * 5
    assert not asker.engine.alive
    assert asker.engine.waiting == asker.engine.running == 0
    with pytest.raises(ClosedError, match="shutting down"):
        asker.ask()


def test_closing_while_others_submit_loses_none(model: Model) -> None:
    for _ in range(5):
        asker, taken = Asker(model, max_queue=10_000), []

        def submit(asker: Asker = asker, taken: list[Work] = taken) -> None:
            with suppress(ClosedError):
                while True:
                    taken.append(asker.ask(3))

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        asker.engine.close()
        for thread in threads:
            thread.join()
        assert {asker.end(work) for work in taken} <= {"closed", "length"}


def test_more_than_may_wait_are_refused_together(asker: Asker) -> None:
    works = [asker.ask() for _ in range(4)]
    few = [Work([1], 5, Sampler(SamplingOptions(), 1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="4 answers would wait, and at most 3 may") as refusal:
        asker.engine.submit(few)
    assert 1 <= refusal.value.retry_after_s <= 60
    asker.engine.submit(few[:1])
    asker.engine.cancel(works)
    assert asker.end(few[0]) == "length"


@pytest.mark.parametrize("part", ["in_common", "cut", "fill_row", "step"])
def test_a_mistake_of_our_own_ends_its_requests_and_no_more(
    asker: Asker, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Slots, part, broken)
        works = [asker.ask(), asker.ask()]
        assert [asker.end(work) for work in works] == ["error", "error"]
    assert asker.end(asker.ask(5)) == "length"
    assert asker.engine.waiting == 0


def test_a_thread_that_dies_tells_everybody(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Scheduler, "step", broken)
    monkeypatch.setattr(Scheduler, "end_all", broken)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    assert asker.end(asker.ask()) == "closed"
    assert not asker.engine.alive
