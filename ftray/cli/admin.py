"""`ftray admin`: what a running endpoint serves, through its admin API."""

from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at and change a running endpoint.")

Url = Annotated[str, typer.Option(help="The admin API, on the endpoint's head node.")]
TokenEnv = Annotated[str, typer.Option(help="Environment variable that holds the admin token.")]
Ref = Annotated[str, typer.Argument(help="`name`, `name@alias` or `name@3`.")]

_URL = "http://127.0.0.1:8001"
_ENV = "FTRAY_ADMIN_TOKEN"


@app.command()
def status(url: Url = _URL, token_env: TokenEnv = _ENV) -> None:
    """What is served, what waits, what was refused and why, as JSON."""
    import json

    typer.echo(json.dumps(_call(url, token_env, "GET", "status"), indent=2, ensure_ascii=False))


@app.command()
def load(ref: Ref, url: Url = _URL, token_env: TokenEnv = _ENV) -> None:
    """Serve a further delta; it answers once every replica has it."""
    _call(url, token_env, "POST", "load", {"model": ref})


@app.command()
def unload(ref: Ref, url: Url = _URL, token_env: TokenEnv = _ENV) -> None:
    """Serve a delta no longer; requests in flight end first."""
    _call(url, token_env, "POST", "unload", {"model": ref})


@app.command()
def retry(url: Url = _URL, token_env: TokenEnv = _ENV) -> None:
    """Give versions that were refused another chance."""
    _call(url, token_env, "POST", "retry")


@app.command()
def drain(url: Url = _URL, token_env: TokenEnv = _ENV) -> None:
    """Take no more requests; prints how many are still being answered."""
    typer.echo(_call(url, token_env, "POST", "drain")["in_flight"])


def _call(url: str, token_env: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the admin API answers. Raises `ClusterError` if it does not, `RequestError` if it refuses."""
    import os

    import httpx

    from ftray.core.errors import ClusterError, ConfigError, RequestError

    token = os.environ.get(token_env)
    if not token:
        raise ConfigError(f"{token_env}: not set; put the admin token there")
    headers = {"authorization": f"Bearer {token}"}
    try:
        response = httpx.request(method, f"{url}/admin/{path}", headers=headers, json=body, timeout=30)
        answer = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ClusterError(f"{url}: the admin API does not answer ({type(error).__name__})") from None
    if response.is_error:
        raise RequestError(answer["error"]["message"], status=response.status_code)
    return answer
