"""Let attention with a sliding window keep its keys and values in a buffer of about the window.

GroupQueryAttention's ``sliding_window_cache`` (onnxruntime 1.30 and later; its contract is in
docs/ContribOperators.md): with a buffer of C slots, a window of W and T tokens so far, the last L of them stand in
slots 0 .. L - 1::

    L = T                                          for T <= C
    L = T - G ceil((T - C) / G),  G = C - W + 1    beyond

Such a graph takes preallocated buffers of W slots at least, for past and present at once; a cache that grows from
nothing it refuses. Whoever binds as many slots as tokens sees no difference.
"""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx import contract

NAME = "window_cache"


class WindowCache(ir.passes.InPlacePass):
    """Sets it in every layer with a window whose past is the graph's own input; ``windows`` has each layer's then."""

    def __init__(self, layers: int) -> None:
        self.windows = [0] * layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes calls of ``CachedAttention``, and the function where there is one to change."""
        past = {name: i for i, name in enumerate(contract.past_names(len(self.windows))[::2])}
        for node in model.graph:
            if node.op_type != "CachedAttention" or node.attributes.get_int("window", -1) < 1:
                continue
            key, layer = node.inputs[3], past.get((node.inputs[3] and node.inputs[3].name) or "")
            if key is None or layer is None or len(key.uses()) != 1:
                continue  # layers share the cache
            self.windows[layer] = node.attributes.get_int("window", 0)
            node.attributes[NAME] = ir.AttrInt64(NAME, 1)
        if not any(self.windows):
            return ir.passes.PassResult(model, False)
        for function in model.functions.values():
            if function.name == "CachedAttention":
                function.attributes[NAME] = ir.AttrInt64(NAME, 0)
                for node in function:
                    if node.op_type == "GroupQueryAttention":
                        attribute = ir.RefAttr("sliding_window_cache", NAME, ir.AttributeType.INT)
                        node.attributes["sliding_window_cache"] = attribute
        return ir.passes.PassResult(model, True)
