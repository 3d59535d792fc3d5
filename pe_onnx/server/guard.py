"""What every request passes first: the key, the size of its body, and the count of answers by status."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pe_onnx.errors import needs
from pe_onnx.server.options import ServerOptions

with needs("serve", "'pe-onnx[serve]'"):
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from pe_onnx.server.metrics import Metrics

SLACK_S = 5.0
"""Over the time of a request: the engine ends one that runs or waits, and says so."""
OPEN = ("/health",)
"""Routes without a key, for whoever watches the server."""
KNOWN = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")


def error_document(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form. What a request held may be no valid text: it is written in ASCII."""

    def plain(text: str | None) -> str | None:
        return text and text.encode("ascii", "backslashreplace").decode()

    return {"error": {"message": plain(message), "type": kind, "param": plain(param), "code": code}}


def error_answer(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer with an ``error_document``."""
    return JSONResponse(error_document(message, kind, param, code), status, dict(headers or {}))


class Guard:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics) -> None:
        self.app = app
        self.options = options
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(scope, message["status"])
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        try:
            async with asyncio.timeout(self.options.timeout_s + SLACK_S):
                await self.app(scope, self._limited(receive), counted)
        except TimeoutError:  # a body that does not come, or a reader that does not read
            if not begun:
                await error_answer(408, "the request did not come in time", "timeout_error")(scope, receive, counted)
        except Exception:
            if not begun:  # what lies around this one answers
                self._count(scope, 500)
            raise

    def _count(self, scope: Scope, status: int) -> None:
        route = scope["path"] if scope["path"] in KNOWN else "other"
        self.metrics.requests.labels(route, str(status)).inc()

    def _refusal(self, path: str, headers: Mapping[str, str]) -> Response | None:
        key = self.options.api_key
        if key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                headers = {"www-authenticate": "Bearer"}
                return error_answer(401, message, "authentication_error", code="invalid_api_key", headers=headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.options.max_body_bytes:
            return error_answer(413, self._too_long())
        return None

    def _limited(self, receive: Receive) -> Receive:
        """A body that comes in pieces has no length to look at."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.options.max_body_bytes:
                raise HTTPException(413, self._too_long())
            return message

        return limited

    def _too_long(self) -> str:
        return f"the body is longer than the {self.options.max_body_bytes} bytes that this server takes"
