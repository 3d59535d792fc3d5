"""No positional encoding (NoPE): order is known from the causal mask alone.

Nothing is added and nothing turned. A query sees the keys before it, and how many those are is all that tells where it
stands.

Formula::

    score[i, j] = q[i] . k[j] * scale        for j <= i, no term of i or j

Paper: Haviv et al. 2022, Transformer Language Models without Positional Encodings Still Learn Positional Information;
Kazemnejad et al. 2023, The Impact of Positional Encoding on Length Generalization in Transformers.

Cost: none: no parameters, no operation.

Cache: cached keys hold no position and stay as they are.

Limits: no length limit. Without a causal mask it knows no order at all: it is for decoders.
"""

from __future__ import annotations

from pe_onnx.encoding import PositionalEncoding


class NoEncoding(PositionalEncoding):
    """Overrides no hook."""
