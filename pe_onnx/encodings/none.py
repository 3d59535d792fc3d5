"""No positional encoding (NoPE): order is known from the causal mask alone.

Haviv et al. 2022; Kazemnejad et al. 2023.
"""

from __future__ import annotations

from pe_onnx.encoding import PositionalEncoding


class NoEncoding(PositionalEncoding):
    """Overrides no hook."""
