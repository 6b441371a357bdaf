"""`ftray tenant`: who may ask an endpoint, in the file that its `tenants_file` names."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftray.cli.options import takes

if TYPE_CHECKING:
    import datetime

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tenants of an endpoint: keys and quotas.")

File = Annotated[str, typer.Argument(help="The file of tenants (JSON); made when needed.")]
Name = Annotated[str, typer.Argument(help="The tenant's name.")]


@dataclass(frozen=True)
class Terms:
    """What a tenant may use, and how much of it; None: not named."""

    delta: Annotated[
        list[str] | None, typer.Option("--delta", help="A delta it may use; may be repeated.")
    ] = None
    weight: Annotated[float | None, typer.Option(help="Share of tokens relative to others' while full.")] = (
        None
    )
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in a minute.")] = None
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Most tokens in a minute, prompts and answers.")
    ] = None
    max_concurrent_requests: Annotated[int | None, typer.Option(help="Most requests at once.")] = None

    def given(self) -> dict[str, Any]:
        """Fields of a tenant that were named."""
        fields = asdict(self)
        fields["deltas"] = fields.pop("delta")
        return {name: value for name, value in fields.items() if value is not None}


@app.command()
@takes(Terms)
def add(file: File, name: Name, terms: Terms) -> None:
    """Add a tenant and print its key, which is shown this once."""
    from ftray.serve.tenant_store import TenantStore

    typer.echo(TenantStore(file).add(name, **terms.given()))


@app.command("set")
@takes(Terms)
def change(file: File, name: Name, terms: Terms) -> None:
    """Change a tenant's deltas, weight or quotas; what is not named stays."""
    from ftray.serve.tenant_store import TenantStore

    TenantStore(file).set(name, **terms.given())


@app.command()
def key(
    file: File,
    name: Name,
    expires_in: Annotated[str, typer.Option(help="Time until it ends, as 12h or 30d; else never.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="chat, completions, models, metrics; may be repeated.")
    ] = None,
) -> None:
    """Give a tenant a further key and print it."""
    import datetime

    from ftray.serve.tenant_store import TenantStore

    until = datetime.datetime.now(datetime.UTC) + _duration(expires_in) if expires_in else None
    scopes: Any = scope or ()
    typer.echo(TenantStore(file).add_key(name, expires_at=until, scopes=scopes))


@app.command()
def rotate(
    file: File,
    name: Name,
    grace: Annotated[str, typer.Option(help="Time the old keys go on, as 30m or 1d.")] = "0s",
) -> None:
    """Give a tenant a new key, print it, and end the others."""
    from ftray.serve.tenant_store import TenantStore

    typer.echo(TenantStore(file).rotate(name, grace=_duration(grace)))


@app.command()
def revoke(
    file: File,
    name: Name,
    key_id: Annotated[str | None, typer.Argument(help="A key's id; without one the tenant goes.")] = None,
) -> None:
    """Take a key from a tenant, or the tenant away."""
    from ftray.serve.tenant_store import TenantStore

    TenantStore(file).revoke(name, key_id)


@app.command("list")
def list_tenants(file: File) -> None:
    """Tenants, their keys' ids, deltas and quotas."""
    from rich.table import Table

    from ftray.cli.screen import out
    from ftray.serve.tenant_store import TenantStore

    table = Table()
    for column in ("tenant", "keys", "deltas", "weight", "requests/min", "tokens/min", "at once"):
        table.add_column(column, overflow="fold")
    for tenant in TenantStore(file).list():
        keys = [f"{key.id}{f' until {key.expires_at}' if key.expires_at else ''}" for key in tenant.all_keys]
        limits = (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent_requests)
        shown = ["-" if limit is None else f"{limit:,}" for limit in limits]
        table.add_row(tenant.name, "\n".join(keys), ", ".join(tenant.deltas), f"{tenant.weight:g}", *shown)
    out.print(table)


_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(text: str) -> "datetime.timedelta":
    """`90s`, `30m`, `12h` or `30d`. Raises `ConfigError`."""
    import datetime

    from ftray.core.errors import ConfigError

    if not (text[:-1].isascii() and text[:-1].isdigit() and len(text) < 8 and text[-1] in _UNITS_S):
        raise ConfigError(f"{text!r} is no time; write 90s, 30m, 12h or 30d")
    return datetime.timedelta(seconds=int(text[:-1]) * _UNITS_S[text[-1]])
