"""pe-onnx: decoders with any positional encoding to ONNX, exactly, and run at the edge with an in-place KV cache.

The verbs load what they need when they are called: ``import pe_onnx`` imports neither torch nor onnxruntime. No
module is named like a verb, or importing it would put the module in the verb's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pe_onnx import custom_ops
    from pe_onnx.checking import check
    from pe_onnx.comparison import compare
    from pe_onnx.exporter import export
    from pe_onnx.generate import load
    from pe_onnx.latency import bench
    from pe_onnx.parity import check_parity
    from pe_onnx.quantization import quantize

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "check", "check_parity", "compare", "custom_ops", "export", "load", "quantize"]

_HOME = {
    "bench": "pe_onnx.latency",
    "check": "pe_onnx.checking",
    "check_parity": "pe_onnx.parity",
    "compare": "pe_onnx.comparison",
    "export": "pe_onnx.exporter",
    "load": "pe_onnx.generate",
    "quantize": "pe_onnx.quantization",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "custom_ops":
        return importlib.import_module("pe_onnx.custom_ops")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pe_onnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
