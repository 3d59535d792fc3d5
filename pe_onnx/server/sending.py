"""Answers on their way: events cross from the engine's thread into the event loop; clients that leave are noticed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pe_onnx.errors import needs
from pe_onnx.server.choices import Choice, Piece
from pe_onnx.server.engine import Engine
from pe_onnx.server.scheduler import Event, Work

with needs("serve", "'pe-onnx[serve]'"):
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")
NO_ANSWER = ("timeout", "error", "closed")
Queue = asyncio.Queue[tuple[Choice, Event]]


class ClientLeftError(Exception):
    """The client closed its connection before it had its answer."""


class Crossing:
    """Hands events to whoever waits for them, in the event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queues: dict[Work, tuple[Choice, Queue]] = {}

    def start(self) -> None:
        """Start the engine, from within the event loop."""
        loop = asyncio.get_running_loop()

        def publish(events: list[tuple[Work, Event]]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it all who waited
                loop.call_soon_threadsafe(self._deliver, events)

        self.engine.start(publish)

    def _deliver(self, events: list[tuple[Work, Event]]) -> None:
        for work, event in events:
            if work in self._queues:
                choice, queue = self._queues[work]
                queue.put_nowait((choice, event))

    async def pieces(self, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Run choices, already submitted by ``submit``, and yield what each event adds until all have ended.

        Where whoever iterates stops before, what is left is given up.
        """
        queue = self._queues[choices[0].work][1]
        left = len(choices)
        try:
            while left:
                choice, event = await queue.get()
                if choice.finish:
                    continue
                piece = choice.take(event)
                if piece.finish:
                    left -= 1
                    self.engine.cancel([choice.work])  # at a stop string it is still running
                yield choice, piece
        finally:
            self.give_up(choices)

    def submit(self, choices: Sequence[Choice]) -> None:
        """Raises what ``Engine.submit`` raises."""
        queue: Queue = asyncio.Queue()
        for choice in choices:
            self._queues[choice.work] = choice, queue
        try:
            self.engine.submit([choice.work for choice in choices])
        except BaseException:
            self.give_up(choices)
            raise

    def give_up(self, choices: Sequence[Choice]) -> None:
        self.engine.cancel([choice.work for choice in choices])
        for choice in choices:
            self._queues.pop(choice.work, None)


async def unless_left(request: Request, answer: Awaitable[T]) -> T:
    """An answer, or ClientLeftError as soon as the client is gone. The request's body must have been read."""
    task = asyncio.ensure_future(answer)
    watch = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: one ``data:`` line for each document, and ``[DONE]``.

    left: called where the client closes its connection before the end. done: called in any case, even where nothing
    was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        documents: AsyncGenerator[dict[str, Any] | None, None],
        left: Callable[[], None],
        done: Callable[[], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.documents = documents
        self.left = left
        self.done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.left()
        finally:
            for one in (task, watch):
                one.cancel()
            self.done()
            results = await asyncio.gather(task, watch, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for document in self.documents:
                text = "[DONE]" if document is None else json.dumps(document, separators=(",", ":"))
                body = f"data: {text}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            await self.documents.aclose()
        await send({"type": "http.response.body", "body": b""})


def failed(choices: Iterable[Choice]) -> Choice | None:
    """The first choice that has no answer: it ran out of time, the model failed, or the server stops."""
    return next((choice for choice in choices if choice.finish in NO_ANSWER), None)
