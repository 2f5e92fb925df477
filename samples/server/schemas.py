"""What requests may hold and what answers do, in OpenAI's terms. What is not here is refused, so that nothing is ignored in
silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from attnspan.runtime.sampling import Sampling

__all__ = [
    "CacheUse",
    "ChatCompletion",
    "ChatRequest",
    "Completion",
    "CompletionRequest",
    "Error",
    "Health",
    "ModelCard",
    "ModelList",
    "Usage",
]

MOST_MESSAGES = 4096
MOST_STOPS = 4


def _whole(value: Any) -> Any:
    """JSON has one kind of numbers: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1), _WHOLE]
Count = Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE]
One = Annotated[int, Field(ge=1, le=1), _WHOLE]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Label = Annotated[str, StringConstraints(max_length=512)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, regex_engine="rust-regex")


class StreamOptions(_Request):
    """include_usage: a last event with the count of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Generation(_Request):
    """What both kinds of requests share. Fields that may hold one value only are there because clients send them."""

    model: Label
    max_tokens: Tokens | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    n: One | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which to end."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """How tokens are chosen; OpenAI's defaults, which draw at temperature 1."""

        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        return Sampling(
            temperature=given(self.temperature, 1.0),
            top_k=self.top_k or 0,
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            seed=None if self.seed is None else self.seed % 2**63,
        )


class TextPart(_Request):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Label | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: Literal[False] | None = None


class CompletionRequest(_Generation):
    """A text, or its token ids, to be continued."""

    prompt: Annotated[str, StringConstraints(min_length=1)] | Annotated[list[Count], Field(min_length=1)]
    echo: Literal[False] | None = None
    best_of: One | None = None


class CacheUse(BaseModel):
    """KV cache of this text: bytes that the last step read, and those that a dense cache holds for as many tokens."""

    kv_bytes: int
    kv_bytes_dense: int


class Usage(BaseModel):
    """Tokens of a request and its answer; a token that ends the text is counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    attnspan: CacheUse


class Answer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int = 0
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One continuation."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A continued text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that requests may name. context_length: most tokens of prompt and answer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["attnspan"] = "attnspan"
    context_length: int


class ModelList(BaseModel):
    """The models that requests may name."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "failed"]


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An answer that is an error."""

    error: ErrorBody


Responses = dict[int | str, dict[str, Any]]
