"""Generate text from a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pe_onnx.cli._options import json_option, parse_bytes, print_json, provider_option, threads_option

if TYPE_CHECKING:
    from pe_onnx.generate import Model, Timing
    from pe_onnx.kv_cache import KVCache
    from pe_onnx.sampling import SamplingOptions


OPENING = "In the beginning"
"""A prompt where there is none, and nobody has named a bundle: a first look at what was just exported."""


@click.command()
@click.argument("bundle", type=click.Path(), metavar="[DIR]", required=False)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("-n", "--max-new-tokens", default=128, metavar="N", show_default=True, help="Tokens to make at most.")
@click.option("--temperature", default=0.0, metavar="X", help="0 takes the most likely token. [0]")
@click.option("--top-k", default=0, metavar="K", help="Draw from the K most likely; 0 for all.")
@click.option("--top-p", default=1.0, metavar="P", help="Draw from the most likely that make up P.")
@click.option("--min-p", default=0.0, metavar="P", help="Drop those below P times the most likely.")
@click.option("--repetition-penalty", default=1.0, metavar="X", help="Above 1 discourages tokens seen.")
@click.option("--seed", type=int, metavar="N", help="Of the draws; the same seed gives the same text.")
@click.option("--beams", default=1, metavar="K", help="Follow the K most likely continuations at once.")
@click.option("--length-penalty", default=1.0, metavar="X", help="Of beams: above 0 favours long texts. [1]")
@click.option(
    "--early-stopping",
    type=click.Choice(["true", "false", "never"]),
    default="false",
    help="Of beams: end at K texts, where a better one is unlikely, or where none can come. [false]",
)
@click.option("--return-sequences", default=1, metavar="N", help="Of beams: print the N best texts.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before this; may be given again.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-sequence token.")
@click.option("--chat", is_flag=True, help="Use the chat template; without a prompt, a conversation.")
@click.option("--system", metavar="TEXT", help="System message of --chat.")
@click.option("--tokens", metavar="ID,ID,...", help="A prompt of token ids.")
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--max-length", type=int, metavar="N", help="Tokens of a row at most. [the trained length]")
@click.option("--max-memory", metavar="SIZE", help="Of the whole process, as 512MB; prompts run in chunks that fit.")
@click.option("--save-cache", metavar="FILE", help="Keep what was computed; --load-cache goes on from there.")
@click.option("--load-cache", metavar="FILE", help="Compute only what FILE does not hold of the prompt's beginning.")
@click.option("--no-verify", is_flag=True, help="Do not check the files' checksums first.")
@provider_option
@threads_option
@json_option
def command(
    bundle: str | None,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    beams: int,
    length_penalty: float,
    early_stopping: str,
    return_sequences: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    chat: bool,
    system: str | None,
    tokens: str | None,
    echo: bool,
    max_length: int | None,
    max_memory: str | None,
    save_cache: str | None,
    load_cache: str | None,
    no_verify: bool,
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Generate text from a bundle.

    One prompt streams, unless with beams; several run as one batch. Without a prompt it is read from standard input.
    A decoder continues its prompt, an encoder-decoder answers it. Speed goes to stderr. Without DIR it is the folder
    "bundle", where pe-onnx export puts one; then a prompt may be missing altogether.
    """
    from pe_onnx.beam_search import BeamOptions
    from pe_onnx.generate import load
    from pe_onnx.sampling import SamplingOptions
    from pe_onnx.saved_cache import check_writable

    sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    early: Any = {"true": True, "false": False}.get(early_stopping, early_stopping)
    search = BeamOptions(beams, length_penalty, early, return_sequences)
    if tokens is not None and (prompts or chat):
        raise click.UsageError("give --tokens or text, not both")
    if system and not chat:
        raise click.UsageError("--system needs --chat")
    if beams == 1 and (length_penalty, early_stopping) != (1, "false"):
        raise click.UsageError("--length-penalty and --early-stopping need --beams above 1")
    if max_new_tokens < 1:
        raise click.UsageError(f"--max-new-tokens = {max_new_tokens} must be at least 1")
    interactive = chat and not prompts and sys.stdin.isatty()
    if interactive and beams > 1:
        raise click.UsageError("--beams needs a prompt: a conversation streams")
    budget = parse_bytes(max_memory, "--max-memory") if max_memory is not None else None
    if beams > 1 and (save_cache or load_cache):
        raise click.UsageError(f"{'--save-cache' if save_cache else '--load-cache'} is not for --beams")
    if save_cache:
        check_writable(save_cache)
    if bundle is not None and not prompts and " " in bundle and not Path(bundle).exists():
        raise click.UsageError(f"{bundle!r} is no folder; name the bundle before the prompt")
    model = load(bundle or "bundle", provider, threads, verify=not no_verify)
    if model.session.device.kind == "cuda" and model.session.not_captured:
        reason = model.session.not_captured
        click.echo(f"pe-onnx: steps are launched one kernel at a time, not as a CUDA graph: {reason}", err=True)
    for option, given in (
        ("--chat", chat),
        ("--echo", echo),
        ("--max-memory", max_memory),
        ("--save-cache", save_cache),
        ("--load-cache", load_cache),
    ):
        if model.encoder is not None and given:
            raise click.UsageError(f"{option} is for a decoder; an encoder-decoder answers its source, give that alone")
    if not prompts and tokens is None and not interactive:
        text = "" if bundle is None and sys.stdin.isatty() else _read_stdin()
        if not text and bundle is not None:
            raise click.UsageError("no prompt: give one as an argument or on standard input")
        echo, prompts = echo or (not text and model.encoder is None), (text or OPENING,)
    cache = model.load_cache(load_cache, max_length) if load_cache else None
    if interactive:
        cache = cache or model.cache(1, max_length)
        _converse(model, system, sampling, max_new_tokens, stop, cache, budget)
        if save_cache:
            cache.save(save_cache)
        return
    if tokens is not None:
        batch: list[list[int]] = [_token_ids(tokens)]
    elif chat:
        batch = [_chat_tokens(model, _messages(system, prompt)) for prompt in prompts]
    else:
        batch = [model.tokenizer.encode(prompt) for prompt in prompts]
    if save_cache and cache is None:
        cache = model.cache(len(batch), max_length)
    streaming = len(batch) == 1 and not as_json and beams == 1

    def write(row: int, piece: str) -> None:
        click.echo(piece, nl=False)

    if echo and streaming and prompts:
        write(0, prompts[0])
    results = model.generate(
        batch,
        max_new_tokens,
        sampling,
        stop=stop,
        stream=write if streaming else None,
        cache=cache,
        reuse=cache is not None,
        max_length=max_length if cache is None else None,
        max_memory_bytes=budget,
        ignore_eos=ignore_eos,
        beams=search,
    )
    if save_cache and cache is not None:
        cache.save(save_cache)
    if as_json:
        timing = model.timing
        counted = {**vars(timing), "computed_tokens": timing.computed_tokens}
        print_json({"generations": [vars(r) for r in results], "timing": counted})
    elif model.bundle.manifest["tokenizer"] is None:
        for result in results:
            click.echo(",".join(map(str, result.tokens)))
    elif streaming:
        click.echo()
    else:
        named = prompts or (tokens or "",)
        for i, result in enumerate(results):
            b, rank = divmod(i, return_sequences)
            number = f"{b + 1}.{rank + 1}" if return_sequences > 1 else f"{b + 1}"
            title = f"--- {number}: {named[b]!r}\n" if len(results) > 1 else ""
            click.echo(f"{title}{prompts[b] if echo and prompts else ''}{result.text}")
    _report(model.timing)


def _report(t: Timing) -> None:
    click.echo(
        f"[{t.prompt_tokens} prompt tokens{f', {t.reused_tokens} of them held,' if t.reused_tokens else ''} "
        f"at {t.prefill_tokens_per_s:.0f}/s, "
        f"{t.new_tokens} new at {t.decode_tokens_per_s:.1f} tokens/s]",
        err=True,
    )


def _read_stdin() -> str:
    if sys.stdin.isatty():
        click.echo("prompt (end with Ctrl-D):", err=True)
    return sys.stdin.read().removesuffix("\n")


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--tokens = {text!r} must be integers separated by commas") from None


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def _chat_tokens(model: Model, messages: list[dict[str, str]]) -> list[int]:
    return model.tokenizer.encode(model.tokenizer.apply_chat_template(messages), add_special_tokens=False)


def _converse(
    model: Model,
    system: str | None,
    sampling: SamplingOptions,
    max_new_tokens: int,
    stop: tuple[str, ...],
    cache: KVCache,
    max_memory_bytes: int | None,
) -> None:
    """Turns until end of input; what the cache holds of the conversation is not computed again."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    click.echo("A conversation; end with Ctrl-D.", err=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        result = model.generate(
            _chat_tokens(model, messages),
            max_new_tokens,
            sampling,
            stop=stop,
            stream=lambda row, piece: click.echo(piece, nl=False),
            cache=cache,
            reuse=True,
            max_memory_bytes=max_memory_bytes,
        )
        click.echo()
        messages.append({"role": "assistant", "content": result.text})
        _report(model.timing)
