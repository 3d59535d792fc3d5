"""The passes that make a graph lean, in the order in which one makes room for the next."""

from __future__ import annotations

import onnx_ir as ir

from pe_onnx.passes.constant_shapes import ConstantShapes
from pe_onnx.passes.fused_norms import FusedNorms
from pe_onnx.passes.fused_rotation import FusedRotation
from pe_onnx.passes.packed_rotation import PackedRotation
from pe_onnx.passes.partial_rotation import PartialRotation
from pe_onnx.passes.reshape_chains import ReshapeChains
from pe_onnx.passes.sliced_tables import SlicedTables
from pe_onnx.passes.split_heads import SplitHeads
from pe_onnx.passes.transposed_norms import TransposedNorms


def lean() -> ir.passes.Sequential:
    """To run once functions of other domains are inlined and shapes are inferred."""
    return ir.passes.Sequential(
        FusedNorms(),
        FusedRotation(),
        PartialRotation(),
        SlicedTables(),
        SplitHeads(),
        TransposedNorms(),
        PackedRotation(),
        ReshapeChains(),
        ConstantShapes(),
    )
