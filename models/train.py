"""Train the small decoders that come with pe-onnx: ``python models/train.py --encoding rope``."""

from __future__ import annotations

from pathlib import Path

import click

from pe_onnx.errors import PeOnnxError, did_you_mean

SHIPPED = ("none", "learned", "sinusoidal", "t5_bias", "alibi", "rope")


@click.command()
@click.option("--encoding", default="all", metavar="NAME", show_default=True, help="One of pe-onnx list, or all six.")
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="FILE", help="A text. [the King James Bible, from Debian]"
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Of 1,024 bytes each. [2400]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    metavar="N",
    show_default=True,
    help="Of weights and windows.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("trained"), metavar="DIR", show_default=True
)
@click.option("--force", is_flag=True, help="Replace weights that are there.")
def command(encoding: str, data: Path | None, steps: int | None, seed: int, output: Path, force: bool) -> None:
    """Train a decoder over bytes with a positional encoding, on one core, in minutes.

    A run that was stopped goes on where it was, and what has ended is not trained again. Weights and log are written to
    DIR, with the text that is held out; those in pe_onnx/trained are the package's own.
    """
    try:
        _train(encoding, data, steps, seed, output, force)
    except PeOnnxError as error:
        click.echo(f"train: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        click.echo("train: stopped; the same command goes on", err=True)
        raise SystemExit(130) from None


def _train(encoding: str, data: Path | None, steps: int | None, seed: int, output: Path, force: bool) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pe_onnx import discovery
    from pe_onnx.errors import ConfigError
    from pe_onnx.models import training, training_text

    known = [*discovery.names("encodings"), "all"]
    if encoding not in known:
        raise ConfigError(f"unknown encoding {encoding!r}{did_you_mean(encoding, known)}")
    settings = training.Settings(seed=seed, **({} if steps is None else {"steps": steps}))
    text = training_text.read(data)
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    for name in SHIPPED if encoding == "all" else (encoding,):
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=settings.steps, bits="")

            def show(made: training.Progress, bar: Progress = bar, task: object = task, name: str = name) -> None:
                bar.update(task, completed=made.step, bits=f"{made.bits:.2f} bits/byte")  # type: ignore[arg-type]
                if made.validation_bits is not None:
                    bar.console.print(
                        f"{name}: step {made.step}, {made.validation_bits:.3f} bits/byte on held-out text"
                    )

            log = training.train(name, text, output, settings, force=force, progress=show)
        click.echo(f"{output / name}.safetensors: {log['validation_bits_per_byte']} bits/byte in {log['seconds']} s")


if __name__ == "__main__":
    command()
