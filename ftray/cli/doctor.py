"""`ftray doctor`."""

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftray.cluster.machine import Finding

_MARKS = {"ok": "", "note": "-", "warning": "!", "error": "X"}


def command(
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Compile the native operations of the engine and DeepSpeed; clear stale locks."
        ),
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Inspect every node of this Ray cluster, as `host:6379`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine or cluster has, and what a run would stumble over."""
    from ftray.cluster.machine import inspect

    if build:
        _build(quiet=as_json)
    if address is None:
        nodes = {"this machine": [*inspect(), _engine_kernels()]}
    else:
        from ftray.cluster.ray_nodes import inspect_nodes

        nodes = inspect_nodes(address)
    if as_json:
        typer.echo(
            json.dumps({name: [dataclasses.asdict(f) for f in found] for name, found in nodes.items()})
        )
    else:
        _show(nodes)
    if any(finding.level == "error" for found in nodes.values() for finding in found):
        raise typer.Exit(1)


def _engine_kernels() -> "Finding":
    from ftray.cluster.machine import Finding

    try:
        from ftray.engine import native
    except ImportError as error:
        return Finding("engine kernels", "note", f"not looked for ({error})")
    if native.library().is_file():
        return Finding("engine kernels", "ok", "built")
    return Finding(
        "engine kernels", "note", "not built, serving is slower", "`ftray doctor --build` compiles them"
    )


def _build(*, quiet: bool) -> None:
    from ftray.cluster import native
    from ftray.engine import native as kernels

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line)

    for lock in native.clear_stale_locks():
        say(f"cleared {lock}")
    say(f"{kernels.NAME}: {kernels.build().parent}")
    for op in native.OPS:
        start = time.monotonic()
        state = "ready" if native.build(op) else "has no place on this accelerator"
        say(f"{op}: {state} ({time.monotonic() - start:.0f} s)")
    if not quiet and native.is_built("cpu_adam"):
        say(
            f"a step of torch's fused AdamW, which ftray takes: {native.compare_adam():.2f} times that of cpu_adam"
        )


def _show(nodes: "dict[str, list[Finding]]") -> None:
    from ftray.cli.screen import out

    for name, findings in nodes.items():
        if len(nodes) > 1:
            out.print(name, highlight=False, soft_wrap=True)
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            line = f"{_MARKS[finding.level]:1} {finding.name:{width}}  {finding.value}"
            line += f"; {finding.remedy}" if finding.remedy else ""
            out.print(line, highlight=False, soft_wrap=True, markup=False)
