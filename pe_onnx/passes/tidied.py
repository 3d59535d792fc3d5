"""Constants folded, no-ops and what nobody reads taken out, equal nodes made one.

onnxscript's ``optimize_ir`` without its rules for convolutions and for pairs of slices. The latter looks at all nodes
for each node, which in a model of thirty layers takes as long as translating it, and finds nothing that FusedRotation
and SplitHeads do not.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
STEPS = 2
"""What one round has simplified can make room for a second."""


class FoldedConstants(ir.passes.InPlacePass):
    """onnxscript's constant folding, which infers shapes on its way."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, modified=optimizer.fold_constants(model).modified)


def tidied() -> ir.passes.Sequential:
    """To run on a model without functions of other domains."""
    simplified = [FoldedConstants(), RewritePass(RULES), common.RemoveUnusedNodesPass()]
    return ir.passes.Sequential(
        ir.passes.PassManager(simplified, steps=STEPS, early_stop=True),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
