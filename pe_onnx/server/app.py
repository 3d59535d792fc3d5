"""The application: OpenAI's API over one bundle, ``/health`` and ``/metrics``.

Source: OpenAI's API reference, whose Python client works unchanged. Errors have its form, and these statuses: 400 for
what a request says, 401 without the key, 404 for another model, 413 for a body too long, 429 with Retry-After where the
queue is full, 503 while the server stops, 504 for a request out of time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from pe_onnx import __version__
from pe_onnx.errors import ConfigError, InputError, PeOnnxError, needs
from pe_onnx.generate import Model
from pe_onnx.server.answers import Answers, ChatAnswers, CompletionAnswers
from pe_onnx.server.asking import Asking, ParameterError
from pe_onnx.server.choices import Choice, Piece
from pe_onnx.server.engine import CLOSED, ClosedError, Engine, QueueFullError
from pe_onnx.server.fitting import slot_length
from pe_onnx.server.invalid import explained
from pe_onnx.server.options import ServerOptions
from pe_onnx.server.protocol import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    ErrorAnswer,
    Health,
    ModelEntry,
    ModelList,
)
from pe_onnx.server.slots import Slots

with needs("serve", "'pe-onnx[serve]'"):
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

from pe_onnx.server.guard import Guard, error_answer, error_document
from pe_onnx.server.metrics import Metrics
from pe_onnx.server.sending import NO_ANSWER, ClientLeftError, Crossing, EventStream, failed, unless_left

log = logging.getLogger("pe_onnx.server")

THREAD_CHARACTERS = 4096
"""A body longer than this is tokenized in a thread, so that streams go on meanwhile."""
CLIENT_LEFT = 499
"""nginx's status of a request whose client left; nobody reads it but the metrics."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 405, 413, 429, 500, 503, 504)
}


def create_app(model: Model, options: ServerOptions) -> FastAPI:
    """The application over an open bundle; its lifespan starts and ends the engine.

    Raises ConfigError for a bundle that cannot be served, or slots that do not fit the memory. ``check_inside`` belongs
    before the bundle is opened.
    """
    engine = Engine(Slots(model.session, options.slots, slot_length(model, options)), options.max_queue)
    return Application(model, engine, options).app


class Application:
    """Routes and what they share."""

    def __init__(self, model: Model, engine: Engine, options: ServerOptions) -> None:
        self.model = model
        self.engine = engine
        self.options = options
        self.crossing = Crossing(engine)
        self.metrics = Metrics(engine)
        self.asking = Asking(model.tokenizer, engine.slots.vocab_size, engine.slots.max_length, options)
        self.created = int(time.time())
        self.app = FastAPI(
            title="pe-onnx",
            version=__version__,
            lifespan=self._lifespan,
            docs_url=None,  # both pages load their scripts from elsewhere
            redoc_url=None,
        )
        self.app.state.engine = engine
        self._add_routes()
        self.app.add_exception_handler(RequestValidationError, _invalid)
        self.app.add_exception_handler(HTTPException, _http)
        self.app.add_exception_handler(PeOnnxError, _refused)
        self.app.add_exception_handler(ClientLeftError, _left)
        self.app.add_exception_handler(Exception, _failed)
        self.app.add_middleware(Guard, options=options, metrics=self.metrics)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.crossing.start()
        yield
        await asyncio.to_thread(self.engine.close)

    def _add_routes(self) -> None:
        add = self.app.add_api_route
        add("/v1/completions", self.completions, methods=["POST"], response_model=CompletionAnswer, responses=ERRORS)
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=ChatAnswer, responses=ERRORS)
        add("/v1/models", self.models, methods=["GET"], response_model=ModelList, responses=ERRORS)
        add("/v1/models/{name:path}", self.model_entry, methods=["GET"], response_model=ModelEntry, responses=ERRORS)
        add("/health", self.health, methods=["GET"], response_model=Health, responses=ERRORS)
        add("/metrics", self.metrics_text, methods=["GET"], response_class=Response, responses=ERRORS)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt, or several."""
        return await self._answer(request, body, self.asking.completion, CompletionAnswers)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, body, self.asking.chat, ChatAnswers)

    async def models(self) -> Response:
        """The one model of this server."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model_entry(self, name: str) -> Response:
        """The model, by its name."""
        self._check_model(name)
        return JSONResponse(self._entry())

    async def health(self) -> Response:
        """Whether requests are taken."""
        if not self.engine.alive:
            return error_answer(503, "the server takes no requests", "server_error")
        return JSONResponse({"status": "ok", "running": self.engine.running, "waiting": self.engine.waiting})

    async def metrics_text(self) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _entry(self) -> dict[str, Any]:
        return {"id": self.options.name, "object": "model", "created": self.created, "owned_by": "pe-onnx"}

    def _check_model(self, name: str) -> None:
        if name != self.options.name:
            raise HTTPException(404, f"model {name!a} is not served here; accepted is {self.options.name!a}")

    async def _answer(
        self, request: Request, body: Any, ask: Callable[[Any], list[Choice]], form: type[Answers]
    ) -> Response:
        begun = time.monotonic()
        self._check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise ParameterError("stream_options", "needs stream = true")
        long = int(request.headers.get("content-length", THREAD_CHARACTERS + 1)) > THREAD_CHARACTERS
        choices = await asyncio.to_thread(ask, body) if long else ask(body)
        self.crossing.submit(choices)
        answers = form(self.options.name, self.model.tokenizer)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            documents = self._documents(choices, answers, with_usage, begun)
            return EventStream(documents, self.metrics.cancelled.inc, partial(self.crossing.give_up, choices))
        try:
            await unless_left(request, self._finish(choices, begun))
        except ClientLeftError:
            self.metrics.cancelled.inc()
            raise
        finally:
            self.crossing.give_up(choices)
        if (choice := failed(choices)) is not None:
            status, error, headers = _without_answer(choice)
            return JSONResponse(error, status, headers)
        return JSONResponse(answers.whole(choices))

    async def _finish(self, choices: list[Choice], begun: float) -> None:
        async with aclosing(self._observed(choices, begun)) as pieces:
            async for _ in pieces:
                pass
        self.metrics.ended(choices, begun)

    async def _observed(self, choices: list[Choice], begun: float) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """What comes of choices, the first token timed."""
        first = True
        async with aclosing(self.crossing.pieces(choices)) as pieces:
            async for choice, piece in pieces:
                if first and choice.tokens:
                    self.metrics.first_token_s.observe(time.monotonic() - begun)
                    first = False
                yield choice, piece

    async def _documents(
        self, choices: list[Choice], answers: Answers, with_usage: bool, begun: float
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """What a stream sends; None for its end."""
        async with aclosing(self._observed(choices, begun)) as pieces:
            for choice in choices:
                if (opening := answers.opening(choice)) is not None:
                    yield opening
            async for choice, piece in pieces:
                if piece.finish in NO_ANSWER:
                    self.metrics.ended(choices, begun)
                    yield _without_answer(choice)[1]
                    return
                if piece.text or piece.likelihoods or piece.finish:
                    yield answers.chunk(choice, piece)
        self.metrics.ended(choices, begun)
        if with_usage:
            yield answers.closing(choices)
        yield None


def _without_answer(choice: Choice) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error and headers of a choice that has none. OpenAI's clients would ask for all of it again, unless told
    not to."""
    if choice.finish == "closed":
        return 503, error_document(CLOSED, "server_error"), {"retry-after": "1"}
    once = {"x-should-retry": "false"}
    if choice.finish == "timeout":
        message = f"out of time after {len(choice.tokens)} tokens"
        return 504, error_document(message, "timeout_error", code="timeout"), once
    log.error("a request failed: %s", choice.message)
    return 500, error_document("the model failed; see the server's log", "server_error"), once


async def _invalid(request: Request, error: Any) -> Response:
    """The first thing that is wrong with a body, without what it held."""
    place, message = explained(error.errors())
    return error_answer(400, f"{place}: {message}" if place else message, param=place or None)


async def _http(request: Request, error: Any) -> Response:
    code = "model_not_found" if error.status_code == 404 and "model" in str(error.detail) else None
    return error_answer(error.status_code, str(error.detail), code=code, headers=error.headers)


async def _refused(request: Request, error: Any) -> Response:
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.retry_after_s)}
        return error_answer(429, str(error), "rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, ClosedError):
        return error_answer(503, str(error), "server_error", headers={"retry-after": "1"})
    if not isinstance(error, InputError | ConfigError):
        log.error("a request failed: %s", error)
        return error_answer(500, "the server failed; see its log", "server_error")
    return error_answer(400, str(error), param=getattr(error, "param", None))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return error_answer(500, "an internal error; see the server's log", "server_error")
