"""What the operators share on the ONNX side: opset, domain, contrib schemas, functions that survive the exporter."""

from typing import Any

from pe_onnx.errors import needs

with needs("export", "'pe-onnx[export]'"):
    import onnx
    import onnx_ir
    from onnx.defs import OpSchema
    from onnx_ir.passes.common import InlinePass
    from onnxscript.values import Op, Opset
    from onnxscript.version_converter import _version_converter

OPSET = 23
"""Of the standard operators in the bodies: the first with Attention, RotaryEmbedding and RMSNormalization."""

DOMAIN = "pe_onnx"
PE_ONNX = Opset(DOMAIN, 1)
MICROSOFT = Opset("com.microsoft", 1)

_kept = False


def keep_functions() -> None:
    """Let functions of the domain ``pe_onnx`` survive ``torch.onnx.export``. Idempotent.

    The exporter converts the opset and optimizes after translation; both begin by inlining every function
    (onnxscript 0.7, onnx-ir 1.1), and the version converter refuses the attribute references of a function's body.
    Functions of other domains are treated as before.
    """
    global _kept
    if _kept:
        return
    _kept = True
    inline_init = InlinePass.__init__
    visit = _version_converter._VersionConverter.visit_graph_or_function

    def init(self: Any, criteria: Any = None) -> None:
        inline_init(self, lambda function: function.domain != DOMAIN and (criteria is None or criteria(function)))

    def visit_others(self: Any, graph_or_function: Any) -> None:
        if not (isinstance(graph_or_function, onnx_ir.Function) and graph_or_function.domain == DOMAIN):
            visit(self, graph_or_function)

    InlinePass.__init__ = init  # type: ignore[method-assign]
    _version_converter._VersionConverter.visit_graph_or_function = visit_others


def _group_query_attention() -> Op:
    """com.microsoft.GroupQueryAttention as onnxruntime 1.32 declares it, in the part that is used here."""
    single, optional = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
    parameter, attribute, kind = OpSchema.FormalParameter, OpSchema.Attribute, OpSchema.AttrType
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    inputs = [parameter("query", "T", param_option=single)]
    inputs += [parameter(n, "T", param_option=optional) for n in ("key", "value", "past_key", "past_value")]
    inputs += [parameter(n, "M", param_option=single) for n in ("seqlens_k", "total_sequence_length")]
    inputs += [parameter(n, "T", param_option=optional) for n in ("cos_cache", "sin_cache")]
    inputs += [parameter("position_ids", "tensor(int64)", param_option=optional)]
    inputs += [parameter(n, "T", param_option=optional) for n in ("attention_bias", "head_sink")]
    attributes = [attribute(n, kind.INT, "", required=True) for n in ("num_heads", "kv_num_heads")]
    attributes += [attribute(n, kind.FLOAT, "") for n in ("scale", "softcap")]
    attributes += [attribute("local_window_size", kind.INT, "")]
    schema = onnx.defs.OpSchema(
        "GroupQueryAttention",
        "com.microsoft",
        1,
        "Grouped-query attention with a KV cache",
        inputs=inputs,
        outputs=[parameter(n, "T") for n in ("output", "present_key", "present_value")],
        type_constraints=[("T", floats, ""), ("M", ["tensor(int32)"], "")],
        attributes=attributes,
    )
    return Op(MICROSOFT, "GroupQueryAttention", schema)


GroupQueryAttention = _group_query_attention()
