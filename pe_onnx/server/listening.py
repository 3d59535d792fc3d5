"""uvicorn, bounded: headers of a request, and how long a stop waits."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from pe_onnx.errors import needs

if TYPE_CHECKING:
    from pe_onnx.server.engine import Engine

with needs("serve", "'pe-onnx[serve]'"):
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEADER_BYTES = 64 << 10
CLOSING_S = 10
"""For answers that say so, when requests are given up."""


class BoundedHeaders(HttpToolsProtocol):
    """httptools, which reads headers of any length, with an end to them."""

    _reading = True
    _unfinished = 0

    def on_message_begin(self) -> None:
        self._reading, self._unfinished = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._reading = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._reading:
            self._unfinished += len(data)
            if self._unfinished > MOST_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The headers are longer than {MOST_HEADER_BYTES} bytes.")


class GracefulServer(uvicorn.Server):
    """Lets requests end for ``grace_s`` seconds; those that have not get an answer that says so."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: int) -> None:
        config.timeout_graceful_shutdown = grace_s + CLOSING_S
        super().__init__(config)
        self.engine = engine
        self.grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.grace_s, loop.run_in_executor, None, self.engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
