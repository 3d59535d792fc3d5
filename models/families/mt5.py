"""mT5 is T5 v1.1 with another vocabulary."""

from pe_onnx.models.families.t5 import ENCODING, SEQ2SEQ, reach, substitutions

__all__ = ["ENCODING", "SEQ2SEQ", "reach", "substitutions"]
