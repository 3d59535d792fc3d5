"""What a request may say: OpenAI's completions and chat completions, as their reference of 2026 has them.

A parameter that is not here is refused by name, rather than ignored: tools, for one, would otherwise vanish without a
word. What changes nothing of an answer, as ``user``, is taken and left alone. Beyond OpenAI's are ``top_k``, ``min_p``,
``repetition_penalty`` and ``ignore_eos``, as `pe-onnx generate` has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pe_onnx.errors import needs

with needs("serve", "'pe-onnx[serve]'"):
    from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_LIKELY = 20
INT64 = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=INT64)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """No unknown names, and no strings for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """null stands for what is left out, of a parameter that is not supported too."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.model_fields}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class PlainText(Strict):
    type: Literal["text"]


class Asked(Strict):
    """What both kinds of requests have."""

    model: Annotated[str, Field(max_length=1000)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    echo: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    """The last five stand empty in answers that clients send back."""

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: PlainText | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """What every refused request is answered with."""

    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    """``cached_tokens``: of the prompt, those that a slot held already."""


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class Health(BaseModel):
    status: Literal["ok"]
    running: int
    waiting: int
