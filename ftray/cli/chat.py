"""`ftray chat`: talk to a model of an endpoint in the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from openai import OpenAI

_HELP = "/model NAME another model   /models what there is   /clear start over   /quit (or Ctrl-D) leave"


def command(
    model: Annotated[str, typer.Argument(help="`base`, `name`, `name@alias` or `name@3`.")] = "base",
    url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000",
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API key, if one is needed.")
    ] = "FTRAY_API_KEY",
    system: Annotated[str, typer.Option(help="Instruction that stands before the conversation.")] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely word each time.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
) -> None:
    """Talk to a model; answers appear as they are generated."""
    import os

    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get(key_env) or "none", max_retries=0)
    chat = Chat(client, model, system, {"temperature": temperature, "max_tokens": max_tokens})
    chat.run()


class Chat:
    """One conversation.

    Args:
        client: of the endpoint.
        model: what is talked to.
        system: instruction in front of everything; may be empty.
        settings: of every request.
    """

    def __init__(self, client: "OpenAI", model: str, system: str, settings: dict[str, Any]) -> None:
        self._client = client
        self._model = model
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages: list[Any] = list(self._start)
        self._settings = settings

    def run(self) -> None:
        """Take turns until the person leaves."""
        from ftray.cli.screen import console

        if console.is_terminal:
            console.print(f"[bold]{self._model}[/bold]  [dim]{_HELP}[/dim]", highlight=False)
        for line in _lines():
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line.strip():
                self._ask(line)

    def _obey(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False: leave."""
        from ftray.cli.screen import console

        word, _, rest = line[1:].strip().partition(" ")
        if word in ("quit", "exit", "q"):
            return False
        if word == "model" and rest:
            self._model = rest.strip()
        elif word == "models":
            names = [model.id for model in self._client.models.list()]
            console.print("  ".join(names), markup=False, highlight=False)
        elif word == "clear":
            self._messages = list(self._start)
        else:
            console.print(_HELP, style="dim", highlight=False)
        return True

    def _ask(self, line: str) -> None:
        """One turn; one that fails leaves the conversation as it was."""
        from openai import APIError

        from ftray.cli.screen import console, out

        self._messages.append({"role": "user", "content": line})
        parts = []
        try:
            stream = self._client.chat.completions.create(
                model=self._model, messages=self._messages, stream=True, **self._settings
            )
            for chunk in stream:
                text = chunk.choices[0].delta.content or "" if chunk.choices else ""
                parts.append(text)
                out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            out.print()
        except (APIError, KeyboardInterrupt) as error:
            self._messages.pop()
            message = "stopped" if isinstance(error, KeyboardInterrupt) else error.message
            console.print(f"\n{message}", style="red", markup=False, highlight=False)
            return
        self._messages.append({"role": "assistant", "content": "".join(parts)})


def _lines() -> Iterator[str]:
    """What the person types, until the end of the input."""
    import sys

    from ftray.cli.screen import console

    prompt = "[bold cyan]>[/bold cyan] " if sys.stdin.isatty() else ""
    while True:
        try:
            yield console.input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
