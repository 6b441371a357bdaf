"""OpenAI's request bodies, as far as they are built. What is not built is refused by name, never ignored."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ftray.core.errors import RequestError
from ftray.engine.api import Sampling

_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not built, with the values that ask for nothing. null always asks for nothing."""

_NO_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""Fields that by OpenAI's definition do not change the answer."""

_STRICT = ConfigDict(extra="forbid", strict=True)

Body = TypeVar("Body", bound="_Common")


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Stop = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple), Field(max_length=16)
]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = _STRICT
    include_usage: bool = False


class _Common(BaseModel):
    model_config = _STRICT
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, default_max_tokens: int) -> Sampling:
        """The engine's settings; OpenAI's default temperature is 1."""
        return Sampling(
            max_tokens=self.max_tokens or default_max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stop or (),
        )

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "_Common":
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only with `stream`; leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = _STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, with fields such as `refusal` set to null."""
        return (
            {key: value for key, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )

    def plain(self) -> dict[str, str]:
        """As chat templates take it: `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Common):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def sampling(self, default_max_tokens: int) -> Sampling:
        """The engine's settings; `max_completion_tokens` is OpenAI's newer name of `max_tokens`."""
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError("max_tokens: differs from max_completion_tokens; send one", param="max_tokens")
        return super().sampling(self.max_completion_tokens or default_max_tokens)


class CompletionBody(_Common):
    """Body of `POST /v1/completions`."""

    prompt: str | list[int] | list[str]

    def prompt_of_one(self) -> str | list[int]:
        """The prompt: a text or token ids. Raises `RequestError` for several."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [part for part in self.prompt if isinstance(part, str)]
        if len(texts) > 1:
            raise RequestError("prompt: several are not built; send one request each", param="prompt")
        return texts[0] if texts else [part for part in self.prompt if isinstance(part, int)]


def parse(body: bytes, cls: type[Body]) -> Body:
    """A request body. Raises `RequestError` (400) naming the field."""
    try:
        # `json.loads` would take bytes too, but lets halves of surrogate pairs through.
        text = body.decode()
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON; send an object", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("the body is not a JSON object; send an object", code="invalid_json")
    if "\\ud" in text.lower():
        _refuse_half_characters(data)
    for field in data.keys() - cls.model_fields.keys():
        if field in _NO_EFFECT or (field in _NOT_BUILT and _asks_for_nothing(field, data[field])):
            del data[field]
        elif field in _NOT_BUILT:
            raise RequestError(
                f"{field}: not built here; leave it out", code="unsupported_parameter", param=field
            )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None


def _refuse_half_characters(data: dict[str, Any]) -> None:
    """JSON's escapes can spell half a character, which no tokenizer and no reply can hold."""
    for field, value in data.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            name = field.encode("utf-8", "replace").decode()
            message = f"{name}: holds half a surrogate pair; send whole characters"
            raise RequestError(message, code="invalid_value", param=name) from None


def _asks_for_nothing(field: str, value: Any) -> bool:
    return value is None or any(value == neutral for neutral in _NOT_BUILT[field])


def _refusal(error: ValidationError) -> RequestError:
    """The first problem, in words that name the field and never quote its value, which may be private."""
    problem = error.errors(include_url=False, include_input=False)[0]
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("list[", "tuple["))]
    field = ".".join(location).encode("utf-8", "replace").decode()[:100] or "body"
    if problem["type"] == "extra_forbidden":
        return RequestError(f"{field}: unknown field; leave it out", code="unknown_parameter", param=field)
    return RequestError(f"{field}: {problem['msg']}", code="invalid_value", param=field)
