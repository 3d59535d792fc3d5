"""Serve a bundle over HTTP, with OpenAI's API."""

from __future__ import annotations

from pathlib import Path

import click

from pe_onnx.cli._options import bundle_argument, parse_bytes, provider_option, threads_option


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, metavar="N", show_default=True, help="0 for any that is free.")
@click.option("--api-key", envvar="PE_ONNX_API_KEY", metavar="KEY", help="What clients must send. [$PE_ONNX_API_KEY]")
@click.option("--name", metavar="NAME", help="Of the model, as clients ask for it. [the folder's]")
@click.option("--slots", default=16, metavar="N", show_default=True, help="Requests that run at once.")
@click.option("--max-length", type=int, metavar="N", help="Tokens of a slot. [the trained length, if it fits]")
@click.option("--max-prompt-tokens", type=int, metavar="N", help="Of a prompt. [what a slot takes]")
@click.option("--max-new-tokens", type=int, metavar="N", help="Of an answer. [what a slot takes]")
@click.option("--max-queue", default=64, metavar="N", show_default=True, help="Requests that wait; 429 beyond.")
@click.option("--max-body", default="1MiB", metavar="SIZE", show_default=True, help="Of a request.")
@click.option("--timeout", default=600.0, metavar="S", show_default=True, help="Of a request, waiting included.")
@click.option("--grace", default=30, metavar="S", show_default=True, help="For requests under way when it stops.")
@provider_option
@threads_option
def command(
    bundle: str,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    slots: int,
    max_length: int | None,
    max_prompt_tokens: int | None,
    max_new_tokens: int | None,
    max_queue: int,
    max_body: str,
    timeout: float,
    grace: int,
    provider: str,
    threads: int,
) -> None:
    """Serve a bundle over HTTP, with OpenAI's API.

    Completions, chat completions, streaming; requests share the running batch. Stops on Ctrl-C or SIGTERM, when those
    under way have ended.
    """
    from pe_onnx.server.options import ServerOptions
    from pe_onnx.server.running import run

    options = ServerOptions(
        name or Path(bundle).resolve().name,
        slots,
        max_length,
        max_prompt_tokens,
        max_new_tokens,
        max_queue,
        parse_bytes(max_body, "--max-body"),
        timeout,
        api_key,
    )

    def ready(address: str, tokens: int | None) -> None:
        length = f"{tokens} tokens" if tokens else "any length"
        click.echo(f"{options.name} at {address}/v1, {slots} slots of {length}", err=True)
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("pe-onnx: everybody who reaches this address may use it; --api-key shuts it", err=True)

    run(Path(bundle), options, host, port, provider, threads, grace, ready)
