"""transformers' masks as what they mean: causal, with a window or chunks, in place of a tensor ``[B, 1, T, S]``.

A modeling file asks ``create_causal_mask`` and its siblings for a mask and hands it on to its layers. Under our name
these return a ``Mask`` that says which keys a query sees; the layers hand it to ``attend`` as they would the tensor. So
each layer gets the window it has in transformers, also where only the mask knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from pe_onnx.errors import CheckpointError

COMPUTED = "its attention does not go through transformers' attention interface: it computes with the mask itself"


@dataclass(frozen=True)
class Mask:
    """A query sees the keys up to its own: of the last ``window`` tokens, and of its own chunk of ``chunk`` tokens."""

    window: int = -1
    """Tokens, the query's own included; -1 for all."""
    chunk: int = 0
    """Tokens; 0 for no chunks."""
    causal: bool = True
    """False where a query sees later keys too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise CheckpointError(COMPUTED)

    def __radd__(self, scores: Any) -> Any:
        raise CheckpointError(COMPUTED)

    def __getitem__(self, index: Any) -> Any:
        raise CheckpointError(COMPUTED)


def register(name: str) -> None:
    """Make transformers' mask functions return a Mask while ``name`` is the attention implementation."""
    AttentionMaskInterface.register(name, _make)


def _make(*args: Any, mask_function: Callable[..., Any], **others: Any) -> Mask:
    """transformers' mask interface. Raises CheckpointError for a mask that is not understood."""
    parts = _parts(mask_function)
    windows: list[int] = []
    chunk = 0
    for part in parts:
        kind = part.__qualname__.partition(".")[0]
        known = part.__module__ == masking_utils.__name__
        if known and kind == "sliding_window_overlay":
            windows.append(int(_closure(part)["sliding_window"]))
        elif known and kind == "chunked_overlay" and not chunk:
            chunk = int(_closure(part)["chunk_size"])
        elif part not in (causal_mask_function, bidirectional_mask_function):
            raise CheckpointError(f"its attention mask has a part {kind!r} that is not understood")
    return Mask(min(windows, default=-1), chunk, causal=causal_mask_function in parts)


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What ``and_masks`` put together."""
    if function.__qualname__ != "and_masks.<locals>.and_mask":
        return [function]
    return [part for inner in _closure(function)["mask_functions"] for part in _parts(inner)]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}
