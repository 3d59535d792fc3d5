"""Decoders: our own with any encoding (decoder.py), and any of transformers' through the bridge (bridge.py)."""

if not __name__.startswith("pe_onnx."):
    raise ImportError("import pe_onnx.models, not models: under two names its classes would exist twice")
