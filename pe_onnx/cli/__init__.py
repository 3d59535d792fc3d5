"""The command line: one file for each command, named like it, found by file name and imported when it is called."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from pe_onnx import __version__, discovery
from pe_onnx.errors import PeOnnxError, did_you_mean


class Commands(click.Group):
    """A file ``cli/NAME.py`` with a click command ``command`` is the command NAME; its first line is the short help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return discovery.names("cli")

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in discovery.names("cli"):
            return None
        return discovery.load("cli", name).command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in discovery.names("cli"):
            known = discovery.names("cli")
            raise click.UsageError(f"no command {args[0]!r}{did_you_mean(args[0], known)} (known: {', '.join(known)})")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, discovery.summary("cli", name)) for name in self.list_commands(ctx)])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pe-onnx")
def cli() -> None:
    """Decoders with any positional encoding to ONNX, exactly or not at all, and run with an in-place KV cache.

    \b
    pe-onnx export --encoding rope -o bundle        our own decoder, random weights
    pe-onnx export --model CHECKPOINT -o bundle     a Hugging Face folder or a GGUF file
    pe-onnx generate bundle "The capital of France is"
    """


def main() -> None:
    """Entry point: what a user caused is one line on stderr and exit code 2 or 1, never a traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours say which stage it is
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except PeOnnxError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(error.strerror or str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"pe-onnx: {' '.join(message.split())}", err=True)
    sys.exit(code)
