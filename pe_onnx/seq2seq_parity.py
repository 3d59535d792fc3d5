"""What a parity check of an encoder-decoder has beside a decoder's: sources, the encoder's output, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pe_onnx.beam_search import BeamOptions, BeamSearch
from pe_onnx.bundle import Bundle
from pe_onnx.errors import InputError
from pe_onnx.generate import search_beams
from pe_onnx.kv_cache import make_cache
from pe_onnx.parity_report import Account, ModeResult
from pe_onnx.session import Session
from pe_onnx.sources import Sources
from pe_onnx.tokenizer import load_tokenizer
from pe_onnx.tolerance import Tolerance

Array = np.ndarray[Any, Any]

BEAM_COUNT, BEAM_TOKENS = 4, 32
ENCODER, BEAMS = "encoder", "beams"
MODES = (ENCODER, BEAMS)


class Seq2SeqReference(Protocol):
    """PyTorch's side."""

    def encode(self, source: Array) -> Array:
        """int64 ``[S]`` to float32 ``[S, C]``."""
        ...

    def decode(self, hidden: Array, ids: Array) -> Array:
        """An encoder's output and tokens int64 ``[1, T]`` to float32 logits ``[1, T, V]``, all in one run."""
        ...

    def beams(self, source: Array, start: int, num_beams: int, tokens: int, ends: list[int]) -> tuple[list[int], float]:
        """The best hypothesis of a beam search and its score: new tokens, the end token included."""
        ...


class EncoderCase(NamedTuple):
    """Sources that the encoder runs in one batch."""

    rows: list[int]
    """Whose sources they are."""
    name: str
    ids: Array
    """int64 ``[B, S]``, ``mask`` likewise."""
    mask: Array
    want: Array
    """What the reference gives, float32 ``[B, S, C]``; zeros at padding."""


class Requests:
    """The sources of a check's rows, and what the reference makes of them."""

    def __init__(
        self, encoder: Session, decoder: Session, sources: Sequence[Array], reference: Seq2SeqReference
    ) -> None:
        self.encoder, self.decoder, self.sources = encoder, decoder, sources
        self.reference = reference
        self.hidden = [reference.encode(source) for source in sources]

    def of(self, rows: Sequence[int]) -> Sources:
        """The sources of some rows, run through the bundle's encoder."""
        return Sources(self.encoder, self.decoder, [self.sources[row].tolist() for row in rows])

    def reference_of(self, row: int) -> Callable[[Array], Array]:
        """Token ids ``[B, T]`` to logits over the row's source."""
        return lambda ids: self.reference.decode(self.hidden[row], ids)

    def compare(self, mode: str, allowed: Tolerance, spread: float) -> ModeResult:
        """One of MODES. spread: of the reference's logits."""
        return self.compare_encoder(allowed) if mode == ENCODER else self.compare_beams(allowed, spread)

    @property
    def spread(self) -> float:
        """Standard deviation of what the reference's encoder gives."""
        return float(np.concatenate(self.hidden).std())

    def padded(self, rows: Sequence[int], side: str = "right") -> EncoderCase:
        """The whole sources of some rows in one batch."""
        S = max(self.sources[row].size for row in rows)
        ids, mask = np.zeros((2, len(rows), S), np.int64)
        want = np.zeros((len(rows), S, self.hidden[0].shape[-1]), np.float32)
        for b, row in enumerate(rows):
            n = self.sources[row].size
            at = slice(S - n, S) if side == "left" else slice(0, n)
            ids[b, at], mask[b, at], want[b, at] = self.sources[row], 1, self.hidden[row]
        return EncoderCase(list(rows), f"padded on the {side}", ids, mask, want)

    def encoder_cases(self) -> Iterator[EncoderCase]:
        """Each source alone, at odd lengths too, then all in one batch, padded on either side."""
        for b, source in enumerate(self.sources):
            for n in sorted({1, 2, source.size // 3 | 1, source.size}):
                want = self.hidden[b] if n == source.size else self.reference.encode(source[:n])
                ids = source[None, :n]
                yield EncoderCase([b], f"of {n} tokens", ids, np.ones_like(ids), want[None])
        for side in ("left", "right"):
            yield self.padded(range(len(self.sources)), side)

    def compare_encoder(self, allowed: Tolerance) -> ModeResult:
        account = Account(ENCODER, self.spread, allowed)
        for case in self.encoder_cases():
            hidden = self.encode(case.ids, case.mask)
            for b, row in enumerate(case.rows):
                held = case.mask[b] != 0
                account.add_values(f"source {row}, {case.name}", case.want[b, held], hidden[b, held])
        return account.finish()

    def compare_beams(self, allowed: Tolerance, spread: float) -> ModeResult:
        """Beam search on each source: the same tokens as transformers', or another hypothesis of nearly its score: a
        score is a mean of logarithms of probabilities, and each moves by at most twice what a logit does."""
        account = Account(BEAMS, spread, allowed)
        start = check_start(self.decoder.bundle)
        ends = load_tokenizer(self.decoder.bundle.folder, self.decoder.bundle.manifest["tokenizer"]).eos_token_ids
        for b, source in enumerate(self.sources):
            search = BeamSearch(BeamOptions(BEAM_COUNT), [[start]], BEAM_TOKENS, ends)
            cache = make_cache(self.decoder, 1, 1 + BEAM_TOKENS, None, self.of([b]))
            search_beams(search, cache, np.stack(cache.prefill([[start]])))
            best = search.finish()[0][0]
            wanted, score = self.reference.beams(source, start, BEAM_COUNT, BEAM_TOKENS, sorted(ends))
            account.add_choice(f"source {b}", best.tokens == wanted, abs(best.score - score))
        return account.finish()

    def encode(self, ids: Array, mask: Array) -> Array:
        """The bundle's encoder on sources int64 ``[B, S]``, to float32 ``[B, S, C]``."""
        return self.encoder.evaluate({"input_ids": ids, "attention_mask": mask})[0].astype(np.float32)


def targets(bundle: Bundle, sources: Sequence[Array], tokens: int, seed: int) -> list[Array]:
    """Random rows of decoder tokens, one for each source, that begin with the start token."""
    rng = np.random.default_rng(seed + 1)
    start = 0 if bundle.start_token is None else bundle.start_token
    return [np.append(start, rng.integers(0, bundle.shape["vocab_size"], tokens - 1)) for _ in sources]


def ragged(sources: Sequence[Array]) -> list[Array]:
    """Random sources cut to different lengths."""
    return [source[: max(1, source.size * (4 - b % 4) // 4)] for b, source in enumerate(sources)]


def check_start(bundle: Bundle) -> int:
    """The token the decoder begins with. Raises InputError where the checkpoint names none."""
    if bundle.start_token is None:
        raise InputError(
            f"bundle {bundle.folder}: its checkpoint names no decoder_start_token_id, with which a decoder begins"
        )
    return bundle.start_token
