"""UMT5 is T5 v1.1 with a table of its own in every layer."""

from pe_onnx.models.families.t5 import SEQ2SEQ, reach, substitutions

ENCODING = "t5_bias_per_layer"

__all__ = ["ENCODING", "SEQ2SEQ", "reach", "substitutions"]
