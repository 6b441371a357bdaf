"""What the API takes, as an OpenAPI document made from the body classes themselves."""

import functools
from typing import Any

from pydantic import BaseModel

from ftray import __version__
from ftray.serve.schema import ChatBody, CompletionBody

_REF = "#/components/schemas/{model}"


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths = {
        "/healthz": {"get": _operation("health", keyed=False)},
        "/metrics": {"get": _operation("metrics")},
        "/v1/models": {"get": _operation("listModels")},
        "/v1/models/{model}": {"get": _operation("showModel") | {"parameters": [_MODEL]}},
    }
    for path, name, body in (
        ("/v1/chat/completions", "createChatCompletion", ChatBody),
        ("/v1/completions", "createCompletion", CompletionBody),
    ):
        _add(schemas, body)
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
        operation = _operation(name) | {"requestBody": {"required": True, "content": content}}
        paths[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ftray", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _add(schemas: dict[str, Any], body: type[BaseModel]) -> None:
    schema = body.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema


def _operation(name: str, *, keyed: bool = True) -> dict[str, Any]:
    problem = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    answers = {
        "200": {"description": "the answer"},
        "default": {"description": "why not", "content": problem},
    }
    return {"operationId": name, "responses": answers, "security": [{"key": []}] if keyed else []}


_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
