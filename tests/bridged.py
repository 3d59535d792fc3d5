"""A transformers model through the real export, in memory, and transformers' own cached decode beside it.

Three runs, each through onnxruntime as the graph stands and through transformers with the same tokens, the same chunks
and the same batch: ``ragged``, three rows, the shortest of one token, then single steps; ``chunked``, one row past the
trained length in chunks and single steps; ``whole``, the same row at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from checkpoints import TRAINED, VOCAB
from transformers import DynamicCache, PreTrainedModel

from pe_onnx.exporter import silenced, to_onnx
from pe_onnx.models.bridge import BridgedDecoder, bridge
from pe_onnx.models.exportable import Exportable
from pe_onnx.models.parts import parts

LENGTHS = (43, 36, 7)
"""Tokens of the ragged rows; the prompt is all but six of them."""
STEPS = 6
PAST_TRAINED = 20

Array = np.ndarray[Any, Any]

torch.set_num_threads(1)  # tiny models: threads cost more than they bring


@dataclass
class Exported:
    """A graph in onnxruntime."""

    session: onnxruntime.InferenceSession
    caches: list[tuple[int, int]]
    target: str
    limit: int | None
    """Tokens that its tables of positions have."""
    first: int
    """The position that the model itself gives the first token."""

    def empty(self, batch: int) -> list[Array]:
        return [np.zeros((batch, K, 0, D), np.float32) for K, D in self.caches for _ in range(2)]

    def __call__(self, ids: Array, mask: Array, positions: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        names = [i.name for i in self.session.get_inputs()]
        logits, *present = self.session.run(None, dict(zip(names, (ids, mask, positions, *past), strict=True)))
        return logits, present


def export(model: PreTrainedModel, target: Any) -> Exported:
    """All logits on both targets. Raises CheckpointError for what the bridge refuses."""
    with silenced():
        module, observed, _ = bridge(model, target, last_only=False)
        (part,) = parts(exportable(model, module), torch.float32, "all")
        onnx_model = to_onnx(part, None, target, "fp32")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(onnx_model).SerializeToString(), options)
    return Exported(session, module.caches, target, observed.max_length, observed.first)


def exportable(model: PreTrainedModel, module: BridgedDecoder) -> Exportable:
    text = model.config.get_text_config(decoder=True)
    return Exportable(module, module.caches, text.vocab_size, "none", {}, source={"kind": "memory"})


@dataclass
class Reference:
    """What transformers gives."""

    ids: Array
    """``[B, n]``, padded on the left."""
    lengths: Sequence[int]
    ends: Sequence[int]
    """Slots at which the chunks end."""
    logits: Array = field(repr=False)
    """``[tokens, V]`` of the tokens that are no padding, row by row."""


def references(
    model: PreTrainedModel, limit: int | None, position: Callable[[Array], Array] = lambda p: p, alone: bool = False
) -> dict[str, Reference]:
    """The runs by name. position: changes the positions that transformers is given; alone: each ragged row without
    the others, for a model that transformers itself does not pad exactly."""
    draw = np.random.default_rng(3)
    total = min(TRAINED + PAST_TRAINED, limit or TRAINED + PAST_TRAINED)
    chunked = (40, 41, 42, TRAINED - 20, *range(TRAINED - 19, total + 1))
    singles = range(LENGTHS[0] - STEPS, LENGTHS[0] + 1)
    row = draw.integers(3, VOCAB, (1, total))
    runs = {"ragged": (draw.integers(3, VOCAB, (3, LENGTHS[0])), LENGTHS, singles)}
    runs |= {"chunked": (row, (total,), chunked), "whole": (row, (total,), (total,))}
    result = {}
    for name, (ids, lengths, ends) in runs.items():
        if alone and len(lengths) > 1:
            skipped = [ids.shape[1] - n for n in lengths]
            rows = [
                transformers_logits(model, ids[b : b + 1, s:], (n,), [max(e - s, 0) for e in ends], position)
                for b, (s, n) in enumerate(zip(skipped, lengths, strict=True))
            ]
            logits = np.concatenate(rows)
        else:
            logits = transformers_logits(model, ids, lengths, ends, position)
        result[name] = Reference(ids, lengths, ends, logits)
    return result


def left_padded(lengths: Sequence[int], total: int) -> tuple[Array, Array]:
    """Mask and positions ``[B, total]``."""
    mask = (np.arange(total) >= total - np.array(lengths)[:, None]).astype(np.int64)
    return mask, np.maximum(mask.cumsum(1) - 1, 0)


@torch.no_grad()
def transformers_logits(
    model: PreTrainedModel, ids: Array, lengths: Sequence[int], ends: Sequence[int], position: Callable[[Array], Array]
) -> Array:
    """transformers' own model with its own cache, rows padded on the left, positions by its own rule."""
    from pe_onnx.models.bridge import takes_positions

    mask, positions = left_padded(lengths, ids.shape[1])
    takes = takes_positions(model)
    model(torch.from_numpy(ids[:, :1]), use_cache=False)  # rotary modules remember the longest sequence: forget it
    cache, begin, parts = DynamicCache(config=model.config), 0, []
    for end in ends:
        named = {"position_ids": torch.from_numpy(position(positions[:, begin:end]))} if takes else {}
        output = model(
            input_ids=torch.from_numpy(ids[:, begin:end]),
            attention_mask=torch.from_numpy(mask[:, :end]),
            past_key_values=cache,
            use_cache=True,
            **named,
        )
        parts.append(output.logits.float().numpy())
        begin = end
    return np.concatenate(parts, 1)[mask == 1]


def error(exported: Exported, reference: Reference, mask_padding: bool = True) -> float:
    """The greatest difference of a logit, of the logits' spread. mask_padding: False leaves padding unmasked."""
    run = _compact if exported.target == "ort" else _padded
    have = run(exported, reference, mask_padding)
    difference = np.abs(have - reference.logits).max()
    return float(difference / reference.logits.std()) if np.isfinite(difference) else float("inf")


def _padded(exported: Exported, reference: Reference, mask_padding: bool) -> Array:
    """Rows padded on the left, as transformers has them."""
    mask, positions = left_padded(reference.lengths, reference.ids.shape[1])
    fed = mask if mask_padding else np.ones_like(mask)
    past, begin, parts = exported.empty(len(mask)), 0, []
    for end in reference.ends:
        logits, past = exported(reference.ids[:, begin:end], fed[:, :end], positions[:, begin:end], past)
        parts.append(logits)
        begin = end
    return np.concatenate(parts, 1)[mask == 1]


def _compact(exported: Exported, reference: Reference, mask_padding: bool) -> Array:
    """The same tokens, each row at the front of its slots."""
    total = reference.ids.shape[1]
    skipped = total - np.array(reference.lengths)
    rows = [reference.ids[b, s:] for b, s in enumerate(skipped)]
    past, begin = exported.empty(len(rows)), np.zeros(len(rows), np.int64)
    parts: list[list[Array]] = [[] for _ in rows]
    for end in reference.ends:
        stop = np.maximum(end - skipped, 0)  # tokens of each row so far
        width = int((stop - begin).max())
        ids = np.zeros((len(rows), width), np.int64)
        for b, row in enumerate(rows):
            ids[b, : stop[b] - begin[b]] = row[begin[b] : stop[b]]
        slots = np.arange(int(stop.max()))
        valid = slots < (stop if mask_padding else np.full(len(rows), stop.max()))[:, None]
        mask = valid.astype(np.int64)
        positions = begin[:, None] + np.arange(width)
        logits, past = exported(ids, mask, positions, past)
        for b in range(len(rows)):
            parts[b].append(logits[b, : stop[b] - begin[b]])
        begin = stop
    return np.concatenate([x for row in parts for x in row])
