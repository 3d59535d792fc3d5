"""The operators of pe-onnx: one file each, found by file name.

Each is a ``torch.library`` operator ``torch.ops.pe_onnx.NAME`` whose body is the plain formula, and a function of the
ONNX domain ``pe_onnx`` written in onnxscript. Call them in a module of your own and export it with::

    torch.onnx.export(module, args, dynamo=True, opset_version=23,
                      custom_translation_table=pe_onnx.custom_ops.translation_table())
"""

if not __name__.startswith("pe_onnx."):
    raise ImportError(
        "import pe_onnx.custom_ops, not custom_ops: under two names each operator would be registered twice"
    )

from collections.abc import Callable
from typing import Any

from pe_onnx.custom_ops._onnx import OPSET, keep_functions
from pe_onnx.custom_ops._operator import Operator
from pe_onnx.custom_ops.alibi_bias import alibi_bias
from pe_onnx.custom_ops.cached_attention import cached_attention
from pe_onnx.custom_ops.cross_attention import cross_attention
from pe_onnx.custom_ops.distance_bias import distance_bias
from pe_onnx.custom_ops.encoder_attention import encoder_attention
from pe_onnx.custom_ops.fire_bias import fire_bias
from pe_onnx.custom_ops.masked_attention import masked_attention
from pe_onnx.custom_ops.relative_band import relative_band
from pe_onnx.custom_ops.rotary_embedding import rotary_embedding
from pe_onnx.custom_ops.t5_relative_bias import t5_relative_bias
from pe_onnx.discovery import load as _load
from pe_onnx.discovery import names

__all__ = [
    "OPSET",
    "alibi_bias",
    "cached_attention",
    "cross_attention",
    "distance_bias",
    "encoder_attention",
    "fire_bias",
    "masked_attention",
    "operators",
    "relative_band",
    "rotary_embedding",
    "t5_relative_bias",
    "translation_table",
]


def operators() -> dict[str, Operator]:
    """Every operator by name, one for each file of this folder."""
    return {name: getattr(_load("custom_ops", name), name) for name in names("custom_ops")}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., custom_translation_table=...)``: torch operator to ONNX function.

    Needs ``opset_version=23`` or later. The exported model holds each operator as a function of the domain
    ``pe_onnx`` with a body, so that it runs in any onnxruntime.
    """
    keep_functions()
    return {operator.overload: operator.translate for operator in operators().values()}
