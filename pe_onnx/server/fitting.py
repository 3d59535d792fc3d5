"""How many tokens a slot has."""

from __future__ import annotations

from pe_onnx.errors import ConfigError
from pe_onnx.generate import Model
from pe_onnx.memory import available_bytes
from pe_onnx.memory_plan import demand, most_fitting
from pe_onnx.server.options import ServerOptions

SHARE = 0.5
"""Of the memory that is free, what slots take where nothing else is said."""
DEVICE_BYTES = 4 << 30
"""Of a CUDA device likewise, which is not asked."""


def slot_length(model: Model, options: ServerOptions) -> int | None:
    """Tokens of each slot: what was asked for, or the trained length, as far as it fits.

    Raises ConfigError for a bundle that cannot be served, and for more than is free.
    """
    bundle = model.bundle
    if bundle.crossing is not None:
        raise ConfigError(f"bundle {bundle.folder} is an encoder-decoder; serve is for decoders")
    if bundle.target != "ort":
        raise ConfigError(
            f"bundle {bundle.folder} has target {bundle.target}: rows of different lengths share a run with target ort "
            f"only; export it with --target ort"
        )
    if bundle.manifest["tokenizer"] is None:
        raise ConfigError(f"bundle {bundle.folder} has no tokenizer, and a server answers in text")
    on_device = model.session.device.kind == "cuda"
    free = None if on_device else available_bytes()
    most = options.max_length or bundle.trained_length or model.session.max_length
    if options.max_length is not None:
        wanted = _bytes(model, options.slots, options.max_length)
        if free is not None and wanted > free:
            raise ConfigError(
                f"{options.slots} slots of {options.max_length} tokens take {wanted / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free: give fewer --slots, or a smaller --max-length"
            )
        return options.max_length
    budget = DEVICE_BYTES if on_device else None if free is None else int(SHARE * free)
    if most is None or budget is None or _bytes(model, options.slots, most) <= budget:
        return most
    fitting = most_fitting(lambda tokens: _bytes(model, options.slots, tokens) <= budget, most)
    if fitting < 1:
        raise ConfigError(f"{options.slots} slots do not fit the {budget / 1e9:.1f} GB there are; give fewer --slots")
    return fitting


def _bytes(model: Model, slots: int, tokens: int) -> int:
    """Of the cache."""
    return demand(model.session, slots, 1, tokens, 1).cache
