"""`ftray serve`: deltas over one base behind an OpenAI-compatible API, until it is told to stop."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftray.serve.ray_app import Handle


def command(
    file: Annotated[str, typer.Argument(help="Serve file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster to serve on; else RAY_ADDRESS or this machine.")
    ] = "",
) -> None:
    """Serve deltas over one base behind an OpenAI-compatible API."""
    import signal
    import threading

    from ftray.cli.screen import bar, out
    from ftray.cluster.ray_session import session
    from ftray.config.load import load
    from ftray.config.serve import ServeConfig
    from ftray.serve.ray_app import run

    config = load(ServeConfig, file, overrides or []).located()  # a job may lose its folder meanwhile
    with session(address or None):
        with bar("start the endpoint"):
            handle = run(config)
        # Ray puts its own handler for SIGTERM when the session starts.
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            out.print(hints(handle, config.asks_for_keys), highlight=False, soft_wrap=True, markup=False)
            stop.wait()
        finally:
            with bar("stop the endpoint"):
                handle.stop()


def hints(handle: "Handle", with_key: bool) -> str:
    """What is served, and the `curl` lines to try it with."""
    lines = [f"serving at {handle.url}/v1; stop with Ctrl-C"]
    lines += [f"  {model.id:24} {model.ref:28} {model.digest}" for model in handle.models]
    if handle.admin_port is not None:
        lines.append(f"admin API on the head node at http://127.0.0.1:{handle.admin_port}/admin")
    key = " -H 'authorization: Bearer <key>'" if with_key else ""
    body = '{{"model": "{0}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    lines.append(f"curl -s {handle.url}/v1/models{key}")
    lines += [
        f"curl -s {handle.url}/v1/chat/completions{key} -d '{body.format(model.id)}'"
        for model in handle.models[-2:]
    ]
    return "\n".join(lines)
