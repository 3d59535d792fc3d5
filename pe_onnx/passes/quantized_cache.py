"""Keys and values in int8: the cache's tensors become a quarter of float32's, their scales stand in the graph.

GroupQueryAttention of onnxruntime 1.32 (domain com.microsoft) rounds new keys and values as it writes them, with a
scale for each channel of each head, and reads them back::

    stored = clamp(round(x / scale), -128, 127)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pe_onnx.errors import ConfigError
from pe_onnx.passes.grouped_attention import cached_attentions, finish, inputs_of, regroup
from pe_onnx.passes.nodes import initializer

INT8 = ir.TensorType(ir.DataType.INT8)

Scales = tuple[Any, Any]
"""Of a layer's keys and of its values, float32 ``[K*D]``."""


class QuantizedCache(ir.passes.InPlacePass):
    """CachedAttention of every layer to GroupQueryAttention over int8.

    scales: of each layer. Raises ConfigError for a graph whose attention is another operator.
    """

    def __init__(self, scales: Sequence[Scales]) -> None:
        super().__init__()
        self.scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = cached_attentions(graph)
        if len(nodes) != len(self.scales):
            raise ConfigError(f"an int8 cache needs CachedAttention in all {len(self.scales)} layers, not {len(nodes)}")
        for layer, (node, scales) in enumerate(zip(nodes, self.scales, strict=True)):
            self._replace(graph, node, layer, scales)
        for value in (*graph.inputs, *graph.outputs):
            if (value.name or "").startswith(("past_key_values.", "present.")):
                value.type = INT8
        finish(model)
        return ir.passes.PassResult(model, True)

    def _replace(self, graph: ir.Graph, node: ir.Node, layer: int, scales: Scales) -> None:
        given = inputs_of(node)
        held = [
            initializer(graph, f"present.{layer}.{kind}_scale", np.asarray(x, np.float32))
            for kind, x in zip("kv", scales, strict=True)
        ]
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        regroup(graph, node, [*given[:7], None, None, None, *given[7:], *held], quantized)
