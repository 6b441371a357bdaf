"""`ftray tune`: search over a recipe's fields and, if asked, publish the winner."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="YAML file of the search.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="`field=value` changes to it.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a search that was stopped or killed.")] = False,
    publish: Annotated[str, typer.Option(help="Publish the winner's delta under this name.")] = "",
    registry: Annotated[Path, typer.Option(help="Folder of the registry to publish to.")] = Path("registry"),
) -> None:
    """Search over a recipe's fields; population-based training unless the file says otherwise."""
    from rich.console import Console
    from rich.live import Live

    from ftray.config.load import load
    from ftray.config.tune import TuneConfig
    from ftray.core.errors import ConfigError
    from ftray.core.types import is_name
    from ftray.tune.population import Population
    from ftray.tune.ray_trials import run
    from ftray.tune.report import table

    if publish and not is_name(publish):
        raise ConfigError(f"--publish: {publish!r} is refused; use a-z, 0-9, `.`, `_`, `-`")
    config = load(TuneConfig, file, overrides or [])
    console = Console()
    population = Population()
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(record: dict[str, object]) -> None:
            population.apply(record)
            live.update(table(population, config.mode, config.num_segments))

        def prepare(done: int, total: int | None) -> None:
            live.update(f"preparing rows: {done / 2**20:.1f} of {(total or done) / 2**20:.1f} MiB")

        result = run(config, resume=resume, on_record=show, on_prepare=prepare)
    console.print(table(population, config.mode, config.num_segments))
    console.print(
        f"{result.num_segments} segments of {result.num_members} members in {result.seconds:.0f} s; "
        f"{result.num_exploits} exploits, {result.num_perturbations} perturbations, "
        f"{result.num_replaced} members replaced, {result.num_failures} failed attempts"
    )
    console.print(f"winner: member {result.member}, {result.metric} {result.score:.4f}, {result.config}")
    console.print(f"delta: {result.delta}\nreport: {result.folder / 'tune_result.json'}, tune.png")
    if publish:
        _publish(result.delta, publish, registry)


def _publish(delta: Path | None, name: str, registry: Path) -> None:
    from ftray.core.errors import TuneError
    from ftray.registry.local import Registry

    if delta is None:
        raise TuneError(
            f"--publish: the winner has no delta; train_fn returned none, so {name!r} is not made"
        )
    entry = Registry(registry).publish(delta, name, lineage={"run": str(delta.parent)})
    typer.echo(f"published {entry.ref} ({entry.digest})")
