"""Export: a decoder, its encoding and a target to a bundle.

``config or checkpoint or module -> Exportable -> torch.onnx.export -> passes -> bundle``. Weights are streamed: they
stay where the module holds them and are turned and written one tensor at a time.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pe_onnx import contract, trained_weights
from pe_onnx.bundle import Bundle, check_output
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError, PeOnnxError, did_you_mean, needs

with needs("export", "'pe-onnx[export]'"):
    import torch
    from torch import nn

from pe_onnx.encoding import all_parameters, encoding_class
from pe_onnx.models.exportable import Exportable, from_config
from pe_onnx.models.half_precision import halve, round_weights
from pe_onnx.models.parts import parts
from pe_onnx.models.proof import Proof, of_module
from pe_onnx.tracing import Progress, to_onnx
from pe_onnx.writing import write


def export(
    source: nn.Module | str | Path | None = None,
    output: str | Path = "bundle",
    *,
    encoding: str | None = None,
    encoding_parameters: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    follow_transformers: bool | None = None,
    preset: str | None = None,
    weights: str | None = None,
    config: Mapping[str, Any] | None = None,
    target: str = "ort",
    dtype: str = "fp32",
    logits: str | None = None,
    layers: int | None = None,
    kv_heads: int | None = None,
    head_size: int | None = None,
    window_cache: bool = False,
    force: bool = False,
    verify: bool = True,
    verbose: bool = False,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Export to the bundle folder ``output`` and return it.

    One of: ``encoding`` for our own decoder (with what ``decoder_config`` takes: ``encoding_parameters``, ``preset``,
    ``weights`` and fields of DecoderConfig in ``config``); ``model`` or a path as ``source`` for a checkpoint, a
    Hugging Face folder or a GGUF file; a module as ``source`` that follows the graph contract,
    ``module(input_ids, attention_mask, position_ids, past_key_values)`` to logits and presents, with its ``layers``,
    ``kv_heads`` and ``head_size``.

    rope_scaling: a longer context for a checkpoint that has plain RoPE, ``"yarn:factor=4"`` or a mapping with its
    ``rope_type``. follow_transformers: let keys of the checkpoint's configuration through that transformers ignores.
    target: ``ort`` or ``portable``. dtype: ``fp32``, ``fp16``, or ``bf16``, which only CUDA can run. logits: ``last``
    or ``all`` (default by target; a module's are what it gives). window_cache: layers with a sliding window keep a
    buffer of about the window in our runtime; other runtimes must bind buffers of the window at least, and none that
    grows. verify: run the finished bundle against the module before it is put in its place, in ``bf16`` its graphs in
    float32 over the rounded weights. Raises ConfigError, CheckpointError for what is not understood, ExportError for
    what cannot be finished or does not compute what PyTorch computes; then nothing is written.
    """
    if verify:
        with needs("the proof of an export", "'pe-onnx[cpu]', or export with --no-verify"):
            import onnxruntime  # noqa: F401
    one_of("target", target, contract.TARGETS)
    one_of("dtype", dtype, contract.DTYPES)
    given_logits, logits = logits, logits or contract.DEFAULT_LOGITS[target]
    one_of("logits", logits, contract.LOGITS)
    if window_cache and target != "ort":
        raise ConfigError(f"window_cache = True is for target ort; {target} has a cache that grows")
    check_output(Path(output), force)
    if isinstance(source, str | Path):
        source, model = None, source
    given = [name for name, x in (("a module", source), ("encoding", encoding), ("model", model)) if x is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of encoding, model and a module; received {' and '.join(given) or 'none'}")

    belonging: dict[str, dict[str, Any]] = {
        "encoding": {
            "encoding_parameters": encoding_parameters,
            "preset": preset,
            "weights": weights,
            "config": config,
        },
        "model": {"rope_scaling": rope_scaling, "follow_transformers": follow_transformers},
        "a module": {"layers": layers, "kv_heads": kv_heads, "head_size": head_size},
    }
    for kind, options in belonging.items():
        astray = [name for name, value in options.items() if value is not None]
        if astray and given != [kind]:
            raise ConfigError(f"{astray[0]} is for {kind}; received {given[0]}")
    quiet = contextlib.nullcontext() if verbose else silenced()
    with quiet:
        progress("load")
        last_only = logits == "last"
        if encoding is not None:
            resolved, preset = decoder_config(encoding, encoding_parameters, preset, weights, config)
            exportable = from_config(resolved, cast(contract.Target, target), last_only, preset, dtype)
        elif model is not None:
            with needs("a checkpoint", "'pe-onnx[export]'"):
                from pe_onnx.models import rope_scaling as scalings
                from pe_onnx.models import seq2seq
                from pe_onnx.models.bridge import from_checkpoint
                from pe_onnx.models.checkpoint import is_seq2seq

            scaling = scalings.parse(rope_scaling) if rope_scaling else None
            path, kind = Path(model), cast(contract.Target, target)
            if is_seq2seq(path) and not scaling:
                if window_cache:
                    raise ConfigError("window_cache = True is for decoders; this checkpoint is an encoder-decoder")
                exportable = seq2seq.from_checkpoint(path, kind, last_only, bool(follow_transformers), dtype)
            else:
                exportable = from_checkpoint(path, kind, last_only, scaling, bool(follow_transformers), dtype)
        else:
            assert source is not None
            if dtype != "fp32":
                source = copy.deepcopy(source)  # the caller's own keeps its precision
                round_weights(source, dtype)
            exportable, found = from_module(source, layers, kv_heads, head_size)
            if given_logits not in (None, found):
                raise ConfigError(f"logits = {given_logits!r}, and the module gives the logits of {found}")
            logits = found
        torch_dtype, limit = getattr(torch, contract.DTYPES[dtype]), exportable.max_length
        if dtype != "fp32":
            halve(exportable.module, dtype)
        models = {  # nothing else may hold the module, whose weights are let go before the proof
            part.file: to_onnx(part, limit, target, dtype, progress) for part in parts(exportable, torch_dtype, logits)
        }
        return write(models, exportable, Path(output), target, dtype, logits, force, verify, progress, window_cache)


def decoder_config(
    encoding: str,
    parameters: Mapping[str, Any] | None = None,
    preset: str | None = None,
    weights: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> tuple[DecoderConfig, str | None]:
    """Our own decoder, and the preset it was made from.

    weights: trained ones that come with pe-onnx, by the encoding they were trained with; a variant of it can have them
    too, and of the fields ``max_position_embeddings``, which otherwise grows by a ``factor``, as it does for a
    checkpoint with ``rope_scaling``. preset: a size with random weights, ``tiny`` where only fields are given. An
    encoding that has weights, with neither parameters nor any of these, has its own. Raises ConfigError.
    """
    fields = dict(fields or {})
    for key in ("encoding", "encoding_parameters", "weights"):
        if key in fields:
            raise ConfigError(f"{key!r} cannot stand among the configuration's fields: it has its own argument")
    own = {"encoding": encoding, "encoding_parameters": dict(parameters or {})}
    if weights is None and preset is None and not fields and not parameters and encoding in trained_weights.names():
        weights = encoding
    if weights is None:
        preset = "tiny" if preset is None else preset
        return DecoderConfig.preset(preset, **own, **fields), preset
    if preset is not None:
        raise ConfigError(f"preset = {preset!r} is for random weights; weights = {weights!r} bring their own sizes")
    if others := sorted(fields.keys() - {"max_position_embeddings"}):
        raise ConfigError(f"{others[0]!r} is for random weights; weights = {weights!r} bring their own configuration")
    trained = trained_weights.config(weights)
    cls = encoding_class(encoding)
    factor = all_parameters(cls, encoding, parameters or {}).get("factor", 1.0)
    if not cls.reads_trained_length:
        fields.setdefault("max_position_embeddings", int(trained["max_position_embeddings"] * factor))
    return DecoderConfig.from_dict({**trained, **own, "weights": weights, **fields}), None


class FloatLogits(nn.Module):
    """A module of the user's own, its logits in float32 as the contract has them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, Any]:
        """The graph contract's tensors in and out."""
        logits, presents = self.module(input_ids, attention_mask, position_ids, past_key_values)
        return logits.float(), presents


def from_module(
    module: nn.Module, layers: int | None, kv_heads: int | None, head_size: int | None
) -> tuple[Exportable, str]:
    """A module of the user's own; the vocabulary, and whether it gives all logits, are read off a run."""
    sizes = {"layers": layers, "kv_heads": kv_heads, "head_size": head_size}
    missing = [name for name, value in sizes.items() if not value]
    if missing or layers is None or kv_heads is None or head_size is None:
        raise ConfigError(f"a module needs its cache's sizes: give {', '.join(missing)}")
    module = FloatLogits(module).eval()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    past = [(torch.zeros(1, kv_heads, 0, head_size, dtype=dtype),) * 2 for _ in range(layers)]
    mask = torch.ones(1, 2, dtype=torch.int64)
    with torch.no_grad():
        logits, presents = module(mask * 0, mask, torch.arange(2)[None], past)
    if len(presents) != layers:
        raise ConfigError(f"layers = {layers}, and the module returns {len(presents)} caches")
    own = type(module.module)
    exportable = Exportable(
        module=module,
        caches=[(kv_heads, head_size)] * layers,
        vocab_size=logits.shape[-1],
        encoding="module",
        parameters={},
        source={"kind": "module", "class": f"{own.__module__}.{own.__qualname__}"},
        config={"model_type": "pe_onnx", "architectures": [own.__qualname__], "vocab_size": logits.shape[-1]},
        proof=_proof_of(module, logits.shape[-1], [(kv_heads, head_size)] * layers, dtype),
    )
    return exportable, "all" if logits.shape[1] == 2 else "last"


def _proof_of(
    module: nn.Module, vocab_size: int, caches: list[contract.CacheShape], dtype: torch.dtype
) -> Proof | None:
    """What a user's module gives on a few tokens; None where it takes none (a short table, say)."""
    try:
        return Proof([(K, D, D) for K, D in caches], vocab_size, of_module(module, caches, dtype))
    except PeOnnxError:
        raise
    except Exception as error:
        logging.getLogger(__name__).info("the module cannot be proven: %s", error)
        return None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep the torch exporter's and transformers' chatter off the terminal; errors are raised, not logged."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def one_of(name: str, value: str, accepted: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raises ConfigError for a value that is not accepted."""
    if value not in accepted:
        hint = did_you_mean(value, accepted)
        raise ConfigError(f"{name} = {value!r} must be one of {', '.join(accepted)}{hint}")
