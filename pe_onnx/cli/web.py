"""Make a static page that runs a bundle in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from pe_onnx.cli._options import bundle_argument, human_bytes, stages


@click.command()
@bundle_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="SITE", help="Folder to make.")
@click.option("--title", metavar="TEXT", help="Shown on the page. [what the bundle was made from]")
@click.option(
    "--npm-folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="npm packages installed there, in place of fetching them.",
)
@click.option("--copy", is_flag=True, help="A copy of the weights in place of a hard link.")
@click.option("--force", is_flag=True, help="Replace a site that is there.")
def command(bundle: str, output: Path, title: str | None, npm_folder: Path | None, copy: bool, force: bool) -> None:
    """Make a static page that runs a bundle in the browser.

    onnxruntime-web and what else the page needs come from npm, once, and are kept below ~/.cache/pe-onnx. The page
    asks nothing of any other server.
    """
    from pe_onnx.site import write_site

    with stages(3, "web") as progress:
        record = write_site(
            bundle, output, title=title, npm_folder=npm_folder, copy=copy, force=force, progress=progress
        )
    files = record["files"]
    of_bundle = sum(size for name, size in files.items() if name.startswith("bundle/"))
    refusal = record["decoder"]["webgpu_refusal"]
    click.echo(
        f"{output}: {len(files) + 1} files, {human_bytes(sum(files.values()))}, "
        f"{human_bytes(of_bundle)} of them the bundle; {f'WASM only: {refusal}' if refusal else 'WASM and WebGPU'}",
        err=True,
    )
    click.echo(f"python -m http.server -d {output}")
