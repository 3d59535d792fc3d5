"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from pe_onnx.errors import ConfigError


@dataclass(frozen=True)
class ServerOptions:
    """Limits and names; ConfigError for one out of its range."""

    name: str
    """Of the model, as clients ask for it."""
    slots: int = 16
    """Requests that run at once."""
    max_length: int | None = None
    """Tokens of a slot, prompt and answer; None for the trained length, or what half of the free memory takes."""
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    """Of one answer; None for all that a slot takes."""
    max_queue: int = 64
    """Requests that wait, besides those that run; 429 beyond."""
    max_body_bytes: int = 1 << 20
    timeout_s: float = 600.0
    """Of a request, the time it waits included."""
    api_key: str | None = None
    """What clients have to send as ``Authorization: Bearer``; None lets everybody in."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "max_prompt_tokens", "max_new_tokens", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue = {self.max_queue} must be at least 0")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s = {self.timeout_s:g} must be above 0")
        if not self.name or len(self.name) > 1000:
            raise ConfigError("name must be the model's name, of 1 to 1000 characters")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("api_key must be printable ASCII: it travels in a header")
