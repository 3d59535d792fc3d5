"""What a comparison of encodings measured, as figures and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pe_onnx.plain_values import plain

FORMAT = 1

Interval = tuple[float, float] | None
"""95 %, of a median; None of fewer than 6 samples."""


@dataclass
class AtLength:
    """One contestant at one length; figures that it has none of are None."""

    length_tokens: int
    cannot: str | None = None
    """Why it cannot run so long a text at all."""
    bits_per_byte: float | None = None
    """Of the held-out text in windows of the length."""
    decode_ms: float | None = None
    """Of the step that makes this token, the others in the cache; a median."""
    decode_interval_ms: Interval = None
    prefill_tokens_per_s: float | None = None
    """Of a prompt of the length; of the median time."""
    prefill_interval_tokens_per_s: Interval = None
    peak_memory_bytes: int | None = None
    """Resident, of a process of its own that ran such a prompt and such a step; measured at few lengths."""


@dataclass
class Bucket:
    """Positions of a window that are looked at together."""

    begin: int
    end: int
    """One past the last."""
    bits_per_byte: float


@dataclass
class Contestant:
    """One bundle."""

    name: str
    bundle: str
    """Its folder; of a decoder that came with pe-onnx how it was exported."""
    encoding: str
    parameters: dict[str, Any]
    trained_length: int | None
    max_length: int | None
    """Tokens that the encoding takes at all; None where nothing limits it."""
    path_dependent: bool
    target: str
    dtype: str
    weight_bytes: int
    encoding_weights: int | None
    """Trained numbers of the encoding itself; None where nobody says, as of a checkpoint."""
    encoding_bytes: int | None
    """Of these, in the bundle's dtype."""
    cache_bytes_per_token: int
    config: dict[str, Any] | None
    """Of our own decoder; None of another's."""
    lengths: list[AtLength] = field(default_factory=list)
    by_position: list[Bucket] = field(default_factory=list)
    """In windows of the greatest length that it takes."""
    no_bits: str | None = None
    """Why the bits of a text cannot be had of it."""
    load_s: float | None = None

    def at(self, length: int) -> AtLength:
        return next(row for row in self.lengths if row.length_tokens == length)


@dataclass
class Comparison:
    """Figures of all contestants, at the same lengths and on the same text."""

    text: str
    """What it was read from."""
    tokens: int
    """Of the text that windows are cut from, in each contestant's own tokens."""
    lengths: list[int]
    left_out: list[int]
    """Lengths that the text is too short for."""
    trained_length: int | None
    """The least of the contestants', which the lengths are multiples of where none were given."""
    provider: str
    threads: int
    """0 for one a core."""
    budget_s: float
    contestants: list[Contestant]
    machine: dict[str, Any]
    tools: dict[str, str]
    elapsed_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes, ms, s and tokens are in the names; figures that are not finite are None."""
        return dict(plain({"format": FORMAT, **dataclasses.asdict(self)}))

    def findings(self) -> Iterator[str]:
        """In sentences what the figures say, best first: past the trained length, in a step, in size."""
        longest = self.lengths[-1]
        scored = [(row.bits_per_byte, c) for c in self.contestants if (row := c.at(longest)).bits_per_byte is not None]
        if len(scored) > 1:
            scored.sort(key=lambda pair: pair[0] or math.inf)
            (best, first), (worst, last) = scored[0], scored[-1]
            yield (
                f"In windows of {longest:,} tokens {first.name} needs the fewest bits per byte, {best:.3f}, and "
                f"{last.name} the most, {worst:.3f}."
            )
        for name, was, now in self._kept():
            yield f"{name} is no worse there than at its trained length: {now:.3f} against {was:.3f}."
        yield from self._extended()
        stopped = [c.name for c in self.contestants if c.at(longest).cannot]
        if stopped:
            yield f"{', '.join(stopped)} cannot run so long a text."
        yield from self._quickest(longest)

    def _extended(self) -> Iterator[str]:
        """Trained weights as they are and under variants of their encoding, at the length that these are for."""
        for base in self.contestants:
            weights = (base.config or {}).get("weights")
            if weights is None or base.encoding != weights or base.trained_length is None:
                continue
            variants = [c for c in self.contestants if c is not base and (c.config or {}).get("weights") == weights]
            factor = max((float(c.parameters.get("factor", 1)) for c in variants), default=1.0)
            length = max((n for n in self.lengths if n <= factor * base.trained_length), default=0)
            bits = [(c.name, c.at(length).bits_per_byte) for c in (base, *variants)] if length else []
            known = [f"{name} {value:.3f}" for name, value in bits if value is not None]
            if len(known) > 1 and length > base.trained_length:
                yield f"At {length:,} tokens, without further training: {', '.join(known)} bits per byte."

    def _quickest(self, length: int) -> Iterator[str]:
        """The quickest step and the slowest, where their intervals are apart."""
        timed = [(row.decode_ms, row.decode_interval_ms, c.name) for c in self.contestants for row in (c.at(length),)]
        known = sorted((ms, interval, name) for ms, interval, name in timed if ms is not None and interval is not None)
        if len(known) > 1 and known[0][1][1] < known[-1][1][0]:
            (fast, _, first), (slow, _, last) = known[0], known[-1]
            yield f"A step behind {length - 1:,} tokens takes {fast:.3g} ms with {first} and {slow:.3g} ms with {last}."

    def _kept(self) -> Iterator[tuple[str, float, float]]:
        """Contestants that need no more bits at the greatest length than at the trained one: name, then, now."""
        for c in self.contestants:
            if c.trained_length in self.lengths and c.trained_length != self.lengths[-1]:
                was, now = c.at(c.trained_length).bits_per_byte, c.at(self.lengths[-1]).bits_per_byte
                if was is not None and now is not None and now <= was:
                    yield c.name, was, now
