"""What PyTorch's exporter builds anew at each call, and alike each time: kept, for tests export often.

Its registry of operators (it parses the source of every one) and the table of decompositions take a quarter of a tiny
export. Whoever asks gets a copy.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

REGISTRATION = "torch.onnx._internal.exporter._registration"
_kept = False


def keep(filled: bool = False) -> None:
    """Idempotent; does nothing while the exporter is not loaded. filled: build them now, for processes forked later."""
    global _kept
    if _kept or REGISTRATION not in sys.modules:
        return
    _kept = True
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry_of = cache(ONNXRegistry.from_torchlib)
    table_of = cache(_decomp.create_onnx_friendly_decomposition_table)

    def from_torchlib(cls: type[ONNXRegistry], opset_version: int = ONNXRegistry().opset_version) -> ONNXRegistry:
        registry = cls()
        made = registry_of(opset_version)
        registry._opset_version = made.opset_version
        registry.functions = {target: list(known) for target, known in made.functions.items()}
        return registry

    def table(onnx_registered_ops: set[Any]) -> dict[Any, Any]:
        return dict(table_of(frozenset(onnx_registered_ops)))  # type: ignore[arg-type]

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[assignment, method-assign]
    _decomp.create_onnx_friendly_decomposition_table = table
    if filled:
        from pe_onnx.custom_ops import OPSET

        ONNXRegistry.from_torchlib(OPSET)
