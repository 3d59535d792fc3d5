"""What the rounding of weights costs: a quantized bundle against PyTorch with the weights it was made from.

Whether a bundle computes rightly with the weights it has is a matter of parity. Here two other things are told:

- weights: the root mean square of what rounding did to each, relative to the weight's own;
- text: the mean KL divergence of the bundle's next token from PyTorch's, and the bits that each of the two needs for a
  byte of a text that neither has seen: ``quality.txt``, written for this, or the user's own. Without a tokenizer the
  tokens are random and the bits are of one token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.parity import Comparison, prepare
from pe_onnx.plain_values import plain
from pe_onnx.text_bits import log_softmax, read_text
from pe_onnx.tolerance import Limit, given_kl, kl_limit

Array = np.ndarray[Any, Any]

TEXT = Path(__file__).with_name("quality.txt")
ROWS, ROW_TOKENS = 8, 160
"""Of a text at most; the rows run at once."""
RANDOM_ROWS, RANDOM_TOKENS = 4, 96
NO_LIMIT = Limit(math.inf, "")
WEIGHT_FACTOR = 2.0
"""A weight's error may be this many times that of rounding to the nearest of even steps."""


class WeightError(NamedTuple):
    """What rounding did to a weight: root mean squares, relative to the weight's own."""

    name: str
    error: float
    expected: float
    """Of even steps as wide as each block's greatest weight asks for."""


@dataclass
class QualityReport:
    """Figures, and the verdict."""

    bundle: str
    reference: str
    on: str
    """What was run: a text, or random tokens."""
    unit: str
    """byte, or token where there is no text."""
    tokens: int = 0
    """Whose probabilities were compared."""
    units: int = 0
    """Bytes or tokens of them."""
    kl: float = 0.0
    """Mean KL divergence of the bundle from PyTorch, nats a token."""
    bits: float = 0.0
    """The bundle's, a unit."""
    reference_bits: float = 0.0
    """PyTorch's."""
    spread: float = 0.0
    """Standard deviation of PyTorch's logits."""
    limit: Limit = NO_LIMIT
    weights: list[WeightError] = field(default_factory=list)
    """Of each rounded weight; empty where the reference is a function, which shows none."""
    seconds: float = 0.0

    @property
    def weight_error(self) -> float:
        """Root mean square over the weights."""
        return _rms([w.error for w in self.weights])

    @property
    def worst(self) -> WeightError | None:
        """The weight furthest beyond what rounding explains."""
        return max(self.weights, key=lambda w: w.error - WEIGHT_FACTOR * w.expected, default=None)

    @property
    def weights_passed(self) -> bool:
        return self.worst is None or self.worst.error <= WEIGHT_FACTOR * self.worst.expected

    @property
    def kl_passed(self) -> bool:
        return self.kl <= self.limit.kl

    @property
    def passed(self) -> bool:
        return self.weights_passed and self.kl_passed

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite is None."""
        worst = None if self.worst is None else self.worst._asdict()
        values = asdict(self) | {"limit": self.limit._asdict(), "weights": len(self.weights)}
        values |= {"weight_error": self.weight_error, "worst_weight": worst, "passed": self.passed}
        return dict(plain(values))


def measure_quality(
    folder: str | Path,
    reference: Any = None,
    *,
    text: str | Path | None = None,
    provider: str = "cpu",
    threads: int = 0,
    seed: int = 0,
    max_kl: float | None = None,
) -> QualityReport:
    """Compare a quantized bundle with PyTorch with the weights it was made from.

    reference: of ``check_parity``. text: a file in UTF-8, in place of the built-in one; its first 1,280 tokens count.
    seed: of random tokens, where the bundle has no tokenizer. max_kl: nats a token, in place of the limit that follows
    from the weights. Raises ConfigError for a bundle that is not quantized, InputError for a text that cannot be used,
    and what ``check_parity`` raises.
    """
    begin = time.perf_counter()
    bundle = read_bundle(folder)
    if bundle.quantization is None:
        raise ConfigError(f"bundle {folder} is not quantized: its weights are PyTorch's")
    if max_kl is not None:
        given_kl(max_kl)
    rows, sizes, on, unit = _rows(bundle, text, seed)
    weights: list[WeightError] = []

    def watch(module: Any) -> Any:
        weights.extend(_weight_errors(module, bundle))
        return module

    compared = prepare(
        folder, reference, rows=rows, modes=["steps"], provider=provider, threads=threads, hold=watch, kernels=True
    )
    if compared.requests is not None:  # each row's decoder goes on where its source ends
        compared.retarget([[bundle.start_token or 0, *rows[(b + 1) % len(rows)]] for b in range(len(rows))])
    report = QualityReport(str(folder), compared.name, on, unit, spread=compared.expected.spread, weights=weights)
    _run(compared, report)
    crossed = compared.requests is not None
    report.units = sum(whole if crossed else rest for whole, rest in sizes)
    report.bits, report.reference_bits = report.bits / report.units, report.reference_bits / report.units
    expected = _rms([w.expected for w in weights])
    report.limit = kl_limit(bundle, expected, report.spread) if max_kl is None else given_kl(max_kl)
    report.seconds = time.perf_counter() - begin
    return report


def _rows(
    bundle: Bundle, text: str | Path | None, seed: int
) -> tuple[list[list[int]], list[tuple[int, int]], str, str]:
    """Token ids, what each row has of units with and without its first token, where they are from, and the unit."""
    limit = min(bundle.max_length or ROW_TOKENS, ROW_TOKENS)
    if bundle.manifest["tokenizer"] is None:
        if text is not None:
            raise InputError(f"bundle {bundle.folder} has no tokenizer for the text {text}")
        rng, size = np.random.default_rng(seed), min(limit, RANDOM_TOKENS)
        rows = rng.integers(0, bundle.shape["vocab_size"], (RANDOM_ROWS, size)).tolist()
        return rows, [(size, size - 1)] * len(rows), "random tokens", "token"
    from pe_onnx.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bundle.folder, bundle.manifest["tokenizer"])
    ids = tokenizer.encode(read_text(Path(text or TEXT)))
    rows = [ids[i : i + limit] for i in range(0, min(len(ids), ROWS * limit), limit)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError(f"text {text} is shorter than two tokens")
    sizes = [tuple(len(tokenizer.decode(part).encode()) for part in (row, row[1:])) for row in rows]
    return rows, sizes, "the built-in text" if text is None else str(text), "byte"  # type: ignore[return-value]


def _run(compared: Comparison, report: QualityReport) -> None:
    """All rows at once, token by token as in decoding; sums of bits, and the mean divergence."""
    rows = compared.rows
    cache = compared.open_cache(range(len(rows)), max(row.size for row in rows))
    made: list[list[Array]] = [[] for _ in rows]
    for i in range(max(row.size for row in rows) - 1):
        logits = cache.decode([int(row[i]) if i < row.size else 0 for row in rows])
        for b, row in enumerate(rows):
            if i + 1 < row.size:
                made[b].append(logits[b].astype(np.float32))
    total = 0.0
    for b, (row, have) in enumerate(zip(rows, made, strict=True)):
        want = compared.expected.along(b, cache, row)[: len(have)]
        for i, logits in enumerate(have):
            log_p, log_q = log_softmax(want[i]), log_softmax(logits)
            total += float((np.exp(log_p) * (log_p - log_q)).sum())
            report.reference_bits -= float(log_p[row[i + 1]]) / math.log(2)
            report.bits -= float(log_q[row[i + 1]]) / math.log(2)
        report.tokens += len(have)
    report.kl = total / report.tokens


def _weight_errors(module: Any, bundle: Bundle) -> list[WeightError]:
    """Of each rounded weight, against the module's."""
    from pe_onnx.rounded_module import matched, oriented

    held = bundle.quantization or {}
    errors = []
    for name, _, make, parameter in matched(module, bundle):
        values = make()
        weight = parameter.detach().float().numpy()
        turned = oriented(values, parameter, name) is not values
        weight = weight.T if turned else weight
        errors.append(_weight_error(name, weight, values, held["bits"], held["block"], held["symmetric"]))
    return errors


def _weight_error(name: str, weight: Array, rounded: Array, bits: int, block: int, symmetric: bool) -> WeightError:
    """weight and rounded: ``[N, K]``. Rounding to the nearest of steps s has a mean square error of s^2 / 12."""
    block = block if weight.shape[1] % block == 0 else 16
    blocks = np.ascontiguousarray(weight).reshape(weight.shape[0], -1, block)
    if symmetric:
        step = np.abs(blocks).max(-1) / (1 << (bits - 1))
    else:
        step = (np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)) / ((1 << bits) - 1)
    size = _rms(weight) or 1.0
    return WeightError(name, _rms(rounded - weight) / size, _rms(step) / math.sqrt(12) / size)


def _rms(values: Array | Sequence[float]) -> float:
    array = np.asarray(values, np.float32)
    return math.sqrt(float(np.square(array, dtype=np.float64).mean())) if array.size else 0.0
