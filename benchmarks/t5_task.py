"""A small T5 that reverses strings: a task that positions decide, learnt in minutes on two cores.

Letters are bytes behind three special tokens, as in ByT5: 0 pads and begins the answer, 1 ends source and answer. A
string of random letters has no order of its own, so that a wrong relative bias shows in every answer. The model is
T5 v1.1 (gated feed-forward, a head of its own); a seed gives the same weights on the same machine.

    python benchmarks/t5_task.py -o FOLDER [--steps 2500] [--seed 0]
"""

from __future__ import annotations

import string
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

PAD, END, SPECIAL = 0, 1, 3
SHORTEST, LONGEST = 4, 24
"""Letters of a string."""
BATCH, HELD_OUT = 64, 500
STEPS, GREATEST_RATE = 2500, 3e-3

SIZES: dict[str, Any] = {
    "vocab_size": 256 + SPECIAL,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}


def strings(count: int, generator: torch.Generator, longest: int = LONGEST) -> list[list[int]]:
    """Random lower-case letters as token ids."""
    first = ord(string.ascii_lowercase[0]) + SPECIAL
    sizes = torch.randint(SHORTEST, longest + 1, (count,), generator=generator)
    return [torch.randint(first, first + 26, (int(n),), generator=generator).tolist() for n in sizes]


def source_of(letters: list[int]) -> list[int]:
    """What the model reads."""
    return [*letters, END]


def answer_of(letters: list[int]) -> list[int]:
    """What it should write."""
    return [*reversed(letters), END]


def padded(rows: list[list[int]]) -> torch.Tensor:
    """int64 ``[B, longest]``, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def train(steps: int = STEPS, seed: int = 0) -> T5ForConditionalGeneration:
    """By teacher forcing, with strings that grow to their full length over the first half of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=GREATEST_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, GREATEST_RATE, total_steps=steps, pct_start=0.1)
    begin = time.perf_counter()
    for step in range(steps):
        longest = min(LONGEST, 2 * SHORTEST + round((LONGEST - 2 * SHORTEST) * 2 * step / steps))
        batch = strings(BATCH, generator, longest)
        source, answer = padded([source_of(x) for x in batch]), padded([answer_of(x) for x in batch])
        begun = torch.nn.functional.pad(answer[:, :-1], (1, 0), value=PAD)
        logits = model(input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=begun).logits
        loss = cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - begin
            click.echo(f"step {step + 1} of {steps}, {seconds:.0f} s: loss {loss.item():.4f}", err=True)
    return model.eval()


@torch.no_grad()
def answers(model: T5ForConditionalGeneration, batch: list[list[int]]) -> list[list[int]]:
    """Greedy answers of PyTorch, up to their end token."""
    source = padded([source_of(x) for x in batch])
    written = model.generate(
        input_ids=source, attention_mask=(source != PAD).long(), do_sample=False, max_new_tokens=LONGEST + 1
    )[:, 1:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in written]


def exact(given: list[list[int]], batch: list[list[int]]) -> float:
    """The share of answers that are right to the last token."""
    return sum(a == answer_of(x) for a, x in zip(given, batch, strict=True)) / len(batch)


def held_out(count: int, seed: int = 0) -> list[list[int]]:
    """Strings that are in no training run: of some thousand times 26^4 at the least, drawn with another seed."""
    return strings(count, torch.Generator().manual_seed(1_000_003 + seed))


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, steps: int, seed: int) -> None:
    """Train, save a Hugging Face folder, and say how many held-out strings come out right."""
    torch.set_num_threads(1)  # tensors this small are no work for two
    model = train(steps, seed)
    model.save_pretrained(output)
    batch = held_out(HELD_OUT)
    click.echo(f"{exact(answers(model, batch), batch):.1%} of {HELD_OUT} held-out strings are reversed exactly")


if __name__ == "__main__":
    main()
