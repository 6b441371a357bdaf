"""Options that several verbs share."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

RegistryRoot = Annotated[
    str, typer.Option(help="Folder of the registry, or a URL such as s3://bucket/registry.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def takes(group: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb that has the parameters of `group`, a dataclass say, besides its own but the last.

    What `group` makes of them is given to the verb as its last parameter.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        *own, last = inspect.signature(verb).parameters.values()
        shared = list(inspect.signature(group).parameters.values())

        @functools.wraps(verb)
        def command(**values: Any) -> None:
            made = group(**{parameter.name: values.pop(parameter.name) for parameter in shared})
            verb(**values, **{last.name: made})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate
