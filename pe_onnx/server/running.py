"""From a bundle to a server that listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from pe_onnx.errors import ConfigError, needs
from pe_onnx.generate import load
from pe_onnx.server.options import ServerOptions

with needs("serve", "'pe-onnx[serve]'"):
    import uvicorn

from pe_onnx.server.app import create_app
from pe_onnx.server.inside import check_inside
from pe_onnx.server.listening import BoundedHeaders, GracefulServer

BACKLOG = 2048
MAX_PORT = 65535
MOST_IDLE = 1024
"""Connections beyond those of requests that run or wait; uvicorn refuses more with 503."""


def run(
    folder: Path,
    options: ServerOptions,
    host: str,
    port: int,
    provider: str = "cpu",
    threads: int = 0,
    grace_s: int = 30,
    ready: Callable[[str, int], None] | None = None,
) -> None:
    """Serve a bundle until SIGINT or SIGTERM; requests under way then have ``grace_s`` seconds to end.

    port: 0 for any. ready: called with the address and the tokens of a slot before requests are taken. Raises what
    ``create_app`` and ``load`` raise, and ConfigError for an address that cannot be had.
    """
    if grace_s < 0:
        raise ConfigError(f"grace_s = {grace_s} must be at least 0")
    listening = _listen(host, port)
    with listening:
        check_inside(folder)
        model = load(folder, provider, threads)
        app = create_app(model, options)
        config = uvicorn.Config(
            app,
            http=BoundedHeaders,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=options.slots + options.max_queue + MOST_IDLE,
        )
        server = GracefulServer(config, app.state.engine, grace_s)
        bound = listening.getsockname()
        shown = f"[{bound[0]}]" if listening.family == socket.AF_INET6 else bound[0]
        if ready is not None:
            ready(f"http://{shown}:{bound[1]}", app.state.engine.slots.max_length)
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"port = {port} must be in 0..{MAX_PORT}; 0 is any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host = {host!r} is no address of this machine: {error}") from None
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
    return listening
