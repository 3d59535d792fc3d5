"""Serve a bundle over HTTP, with OpenAI's API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pe_onnx.cli._options import bundle_argument, parse_bytes, provider_option, threads_option

if TYPE_CHECKING:
    from pe_onnx.server.options import ServerOptions


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
@click.option("--ray", is_flag=True, help="Replicas in Ray Serve, here or in the cluster that RAY_ADDRESS names.")
@click.option(
    "--replicas", default="1", metavar="N|A-B", show_default=True, help="With --ray; A-B as load asks for it."
)
@click.option("--ray-config", type=click.Path(path_type=Path), metavar="FILE", help="Write a file for `serve deploy`.")
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
    ray: bool,
    replicas: str,
    ray_config: Path | None,
    provider: str,
    threads: int,
) -> None:
    """Serve a bundle over HTTP, with OpenAI's API.

    Completions, chat completions, streaming; requests share the running batch. Stops on Ctrl-C or SIGTERM, when those
    under way have ended.
    """
    from pe_onnx.server.options import ServerOptions

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

    if ray or ray_config is not None:
        _replicate(Path(bundle), options, host, port, replicas, ray_config, provider, threads, grace)
        return
    if replicas != "1":
        raise click.UsageError("--replicas needs --ray or --ray-config")
    from pe_onnx.server.running import run

    def ready(address: str, tokens: int | None) -> None:
        length = f"{tokens} tokens" if tokens else "any length"
        click.echo(f"{options.name} at {address}/v1, {slots} slots of {length}", err=True)
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("pe-onnx: everybody who reaches this address may use it; --api-key shuts it", err=True)

    run(Path(bundle), options, host, port, provider, threads, grace, ready)


def _replicate(
    bundle: Path,
    options: ServerOptions,
    host: str,
    port: int,
    replicas: str,
    config: Path | None,
    provider: str,
    threads: int,
    grace: int,
) -> None:
    """Serve in Ray, or write down how."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", replicas)
    if found is None:
        raise click.UsageError(f"--replicas = {replicas!r} must be N, or A-B for as many as load asks for")
    from pe_onnx.bundle import read_bundle
    from pe_onnx.report_files import check_writable, write_report
    from pe_onnx.server import replicas as deployment
    from pe_onnx.server.inside import check_inside

    most = int(found[2]) if found[2] else None
    placement = deployment.Placement(int(found[1]), most, provider, max(threads, 1), grace)
    check_inside(bundle)
    read_bundle(bundle)
    if config is None:
        deployment.run(bundle, options, placement, host, port)
        return
    check_writable(config, "--ray-config")
    write_report(config, deployment.configuration(bundle, options, placement, host, port))
    key = f"; set {deployment.KEY_VARIABLE} where Ray runs" if options.api_key else ""
    click.echo(f"{config}: serve deploy {config}{key}", err=True)
