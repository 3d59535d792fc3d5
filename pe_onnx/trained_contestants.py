"""The trained byte-level decoders that come with pe-onnx, as contestants: exported for as long as they are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pe_onnx import trained_weights
from pe_onnx.bundle import Bundle
from pe_onnx.errors import ConfigError, did_you_mean

EXTENDED_FACTOR = 4
"""Of RoPE's trained length, which its weights are given at export."""

Progress = Callable[[str], None]


class Spec(NamedTuple):
    """A decoder with trained weights that come with pe-onnx, under an encoding."""

    encoding: str
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        values = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.encoding}:{values}" if values else self.encoding


def shipped() -> list[Spec]:
    """The trained decoders that come with pe-onnx."""
    return [Spec(name, {}) for name in trained_weights.names()]


def extended_rope() -> list[Spec]:
    """RoPE's trained weights at a longer context without further training."""
    return [Spec(name, {"factor": EXTENDED_FACTOR}) for name in ("rope_linear", "rope_ntk", "rope_yarn")]


def trained_for(spec: Spec) -> str:
    """Which trained weights a spec is over. Raises ConfigError where there are none."""
    known = trained_weights.names()
    if spec.encoding in known:
        return spec.encoding
    if spec.encoding.startswith("rope_") and "rope" in known:
        return "rope"
    hint = did_you_mean(spec.encoding, known)
    raise ConfigError(f"encoding {spec.encoding!r} has no trained weights{hint} (known: {', '.join(known)})")


@contextmanager
def exported(
    specs: Sequence[Spec], weights: Sequence[str], dtype: str, progress: Progress
) -> Iterator[list[tuple[Spec, Bundle]]]:
    """Bundles of trained decoders, for as long as they are measured.

    weights: of each, by the encoding they were trained with. Raises MissingDependencyError without PyTorch, and what
    ``export`` raises.
    """
    if not specs:
        yield []
        return
    from pe_onnx.exporter import export  # PyTorch

    with tempfile.TemporaryDirectory(prefix="pe-onnx-compare-") as place:
        made = []
        for i, spec in enumerate(specs):
            progress(f"export {spec.name}")
            bundle = export(
                encoding=spec.encoding,
                encoding_parameters=spec.parameters,
                weights=weights[i],
                output=Path(place, str(i)),
                dtype=dtype,
                logits="all",
            )
            made.append((spec, bundle))
        yield made
