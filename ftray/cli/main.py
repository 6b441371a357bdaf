"""`ftray`: one thin command per verb, each imported only when it is used.

`ftray --help` answers without importing torch or ray; a user's mistake is one line and exit code 2.
"""

import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ftray.core.errors import FtrayError, RunStopped

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "ftray.cli.quickstart:command",
        "Raw text to a live two-tenant endpoint, on this machine.",
    ),
    "data": ("ftray.cli.data:app", "Prepare a corpus and look at it."),
    "run": ("ftray.cli.run:command", "Train one recipe."),
    "tune": ("ftray.cli.tune:command", "Search over a recipe's fields."),
    "eval": ("ftray.cli.eval:command", "Score the base and deltas on held-out rows."),
    "publish": ("ftray.cli.publish:command", "Put a delta into the registry under a name."),
    "promote": ("ftray.cli.promote:promote", "Point an alias at a published version."),
    "rollback": ("ftray.cli.promote:rollback", "Point an alias at what it pointed at before."),
    "serve": ("ftray.cli.serve:command", "Serve deltas over one base behind an OpenAI-compatible API."),
    "chat": ("ftray.cli.chat:command", "Talk to a model of an endpoint in the terminal."),
    "tenant": ("ftray.cli.tenant:app", "Tenants of an endpoint: keys, deltas and quotas."),
    "admin": ("ftray.cli.admin:app", "Look at and change a running endpoint."),
    "generate": ("ftray.cli.generate:command", "Batch inference of a JSON lines file."),
    "submit": ("ftray.cli.submit:command", "Submit a recipe or a job file to a Ray cluster."),
    "jobs": ("ftray.cli.jobs:app", "List, watch and stop submitted jobs."),
    "list": ("ftray.cli.list:command", "List what the registry holds."),
    "show": ("ftray.cli.show:command", "Show a published delta and its lineage."),
    "delta": ("ftray.cli.delta:app", "Calculate with deltas: scale, add, average, merge, extract."),
    "lineage": ("ftray.cli.lineage:command", "Show where a delta comes from and what came of it."),
    "registry": ("ftray.cli.registry:app", "Pins, history and garbage collection of a registry."),
    "check": ("ftray.cli.check:command", "Check a recipe before any hardware is taken."),
    "doctor": ("ftray.cli.doctor:command", "Say what this machine or cluster has, and what would stumble."),
    "plan": (
        "ftray.cli.plan:command",
        "Say what a run will need: steps, tokens, memory; nothing is allocated.",
    ),
    "version": ("ftray.cli.version:command", "Print the versions of ftray and of what it stands on."),
}


class Verbs(TyperGroup):
    """A command group whose members are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        target, summary = VERBS[cmd_name]
        if ctx.resilient_parsing or _only_help(sys.argv[1:]):
            return _stub(cmd_name, summary)
        module, _, attribute = target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = get_command(found)
        else:
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(name=cmd_name)(found)
            command = get_command(single)
        command.name = cmd_name
        return command


def _only_help(arguments: Sequence[str]) -> bool:
    return not arguments or arguments[0] in ("--help", "-h")


def _stub(name: str, summary: str) -> Any:
    """A command that only carries its help line, for the overview."""
    app = typer.Typer(add_completion=False)
    app.command(name=name, help=summary)(lambda: None)
    return get_command(app)


app = typer.Typer(
    cls=Verbs,
    name="ftray",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Raw text to a live multi-tenant endpoint of fine-tuned models on one Ray cluster.",
)


@app.callback()
def _root() -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs a verb; a user's mistake becomes one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if arguments is None and words[:1] == ["run"]:
        from ftray.cluster.allocator import restart_for

        restart_for(words[1:])
    words = [word for word in words if word != "--debug"]
    sys.argv[1:] = words
    # `package.module:attr` in a recipe means the user's own code, which is where the user stands.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        app(args=words, prog_name="ftray")
    except RunStopped as stopped:  # as the shell does for a process that a signal ended
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(128 + (stopped.signum or signal.SIGTERM))
    except FtrayError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written, a file in a folder's place
        if debug:
            raise
        cause = getattr(error, "cause", error)  # Ray's wrapper of what a worker raised
        named = cause.filename is not None and cause.strerror is not None
        _fail(f"{cause.filename}: {cause.strerror}" if named else str(cause) or type(cause).__name__)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
