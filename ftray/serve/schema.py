"""OpenAI's request bodies, as far as they are built. What is not built is refused by name, never ignored."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ftray.core.errors import RequestError
from ftray.engine.request import MAX_LOGPROBS, MIN_PENALTY, Sampling
from ftray.serve.messages import MAX_DEPTH, STRICT, Message, Tool, is_too_deep

MAX_CHOICES = 128
"""Most answers in one response: prompts times `n`."""

_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not built, with the values that ask for nothing. null always asks for nothing."""

_NO_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""Fields that by OpenAI's definition do not change the answer."""

Body = TypeVar("Body", bound="CommonBody")


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Stop = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple), Field(max_length=16)
]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = STRICT
    include_usage: bool = False


class CommonBody(BaseModel):
    """What both bodies have; the last six fields are not OpenAI's but vLLM's."""

    model_config = STRICT
    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=MIN_PENALTY, le=10, allow_inf_nan=False)
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None

    def sampling(self, default_max_tokens: int) -> Sampling:
        """The engine's settings; OpenAI's default temperature is 1."""
        return Sampling(**self._sampling(default_max_tokens))

    def _sampling(self, default_max_tokens: int) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in _PASSED_ON if getattr(self, name) is not None}
        return {
            "temperature": 1.0,
            "max_tokens": default_max_tokens,
            **given,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
        }

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "CommonBody":
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only with `stream`; leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


_PASSED_ON = (
    "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "n", "stop", "top_k",
    "min_p", "repetition_penalty", "min_tokens", "ignore_eos",
)  # fmt: skip


class ChatBody(CommonBody):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def active_tools(self) -> list[Tool]:
        """The tools the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs: only with `logprobs`; set it")
        if self.tool_choice == "auto" and not self.tools:
            raise PydanticCustomError("tool_choice", "tool_choice: only with `tools`; leave it out")
        return self

    def _sampling(self, default_max_tokens: int) -> dict[str, Any]:
        """`max_completion_tokens` is OpenAI's newer name of `max_tokens`."""
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError("max_tokens: differs from max_completion_tokens; send one", param="max_tokens")
        settings = super()._sampling(self.max_completion_tokens or default_max_tokens)
        return settings | {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionBody(CommonBody):
    """Body of `POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    def _sampling(self, default_max_tokens: int) -> dict[str, Any]:
        settings = super()._sampling(default_max_tokens) | {"logprobs": self.logprobs}
        # With nothing to generate, the prompt is only scored.
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            settings["prompt_logprobs"] = self.logprobs or 0
        return settings


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
    if is_too_deep(data):
        message = f"the body is nested more than {MAX_DEPTH} deep; send a flatter one"
        raise RequestError(message, code="invalid_json")
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
