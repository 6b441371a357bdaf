"""Turns of a conversation and the tools it may use, as OpenAI's chat bodies hold them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", strict=True)
"""No unknown fields, no conversions."""

MAX_DEPTH = 64
"""Most objects and lists inside each other; templates and serialisers call themselves for each."""


def is_too_deep(value: dict[str, Any]) -> bool:
    """Whether an object is nested deeper than `MAX_DEPTH`."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """What a call calls; `arguments` is JSON in a string."""

    model_config = STRICT
    name: str
    arguments: str

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as an object."""
        return {"name": self.name, "arguments": json.loads(self.arguments)}

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "FunctionCall":
        try:
            parsed = json.loads(self.arguments)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict) or is_too_deep(parsed):
            raise PydanticCustomError(
                "arguments", "arguments: not a JSON object in a string, or nested too deeply"
            )
        return self


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = STRICT
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, with fields such as `refusal` set to null."""
        return (
            {key: value for key, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("content", "content: missing; write it")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "tool_calls: only an assistant's turn has them")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "tool_call_id", "tool_call_id: a tool's turn needs it, others have none"
            )
        return self

    @property
    def text(self) -> str:
        """The content in one piece."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def num_chars(self) -> int:
        """Characters that go to the template."""
        calls = self.tool_calls or []
        return len(self.text) + sum(len(call.function.name) + len(call.function.arguments) for call in calls)

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: `developer` is OpenAI's newer word for `system`."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.text
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": call.type, "function": call.function.plain()}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(BaseModel):
    """What a tool is called and takes."""

    model_config = STRICT
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(BaseModel):
    """A function the model may call."""

    model_config = STRICT
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object"}, **function}}
