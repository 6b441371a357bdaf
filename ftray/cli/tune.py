"""`ftray tune`: search over a recipe's fields, look at a search, train its winner again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ftray.cli.options import RegistryRoot
from ftray.cli.publish import MEASURING, Parity, published_lines

if TYPE_CHECKING:
    from ftray.tune.result import TuneResult

Publish = Annotated[str, typer.Option(help="Publish the winner's delta, with its lineage, under this name.")]


class SearchUnlessNamed(TyperGroup):
    """Takes `ftray tune FILE` for `ftray tune search FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the verb in front of what names none."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["search", *args]
        return super().parse_args(ctx, args)


command = typer.Typer(
    cls=SearchUnlessNamed,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Search over a recipe's fields: `ftray tune FILE`; look at a search; train its winner again.",
)


@command.command()
def search(
    file: Annotated[Path, typer.Argument(help="YAML file of the search; with --space its recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="`field=value` changes to the search.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="YAML file of the search's fields (`space`, `policy`, ...).")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a search that was stopped or killed.")] = False,
    publish: Publish = "",
    registry: RegistryRoot = "registry",
    parity: Parity = True,
) -> None:
    """Search over a recipe's fields; population-based training unless the file says otherwise."""
    from rich.console import Console
    from rich.live import Live

    from ftray.config.search import load_search
    from ftray.tune.population import Population
    from ftray.tune.ray_trials import run
    from ftray.tune.table import table

    _check_name(publish)
    config = load_search(file, space, overrides or [])
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
    for line in _words(result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"delta: {result.delta}\nresult: {result.folder / 'tune_result.json'}, tune.png")
    console.print(f"more: ftray tune report {result.folder}", soft_wrap=True)
    if publish:
        _publish(result, publish, registry, parity)


@command.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a search, also of one under way.")],
    publish: Publish = "",
    registry: RegistryRoot = "registry",
    parity: Parity = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Lineage, schedules, curves, parallel coordinates as PNG; the best recipe; what was spent and saved."""
    from ftray.cli.screen import out
    from ftray.tune.journal import read
    from ftray.tune.members import JOURNAL
    from ftray.tune.population import replay as state_of
    from ftray.tune.report import report as write
    from ftray.tune.table import table

    _check_name(publish)
    written = write(folder)
    if as_json:
        typer.echo((folder / "report" / "tune_result.json").read_text().rstrip())
    else:
        population = state_of(read(folder / JOURNAL))
        assert population.opened is not None
        out.print(table(population, written.result.mode, population.opened["num_segments"]))
        for line in _words(written.result):
            out.print(line, highlight=False, soft_wrap=True)
        for path in written.files:
            out.print(str(path), highlight=False, soft_wrap=True)
    if publish:
        _publish(written.result, publish, registry, parity)


@command.command()
def replay(
    journal: Annotated[Path, typer.Argument(help="The journal of a search: its `journal.jsonl`.")],
    member: Annotated[int | None, typer.Option(help="Whose schedule; default: the winner's.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to train; default: a folder beside the journal.")
    ] = None,
) -> None:
    """Train the winner's schedule again, alone and in this process, and compare the weights."""
    from ftray.cli.screen import bar, out
    from ftray.tune.replay import replay_schedule

    with bar("replay") as progress:
        found = replay_schedule(journal, output, member, progress)
    says = {
        True: "the weights are those of the search, bit for bit",
        False: (
            f"the weights are those of the search but for rounding ({found.difference:.1e} at most)"
            if found.rounded
            else "the weights differ from those of the search"
        ),
        None: "the search's own weights are gone, so there is nothing to compare with",
    }
    scores = f"{found.score:.6f}, in the search {found.recorded_score:.6f}"
    out.print(f"member {found.member}: {scores}; {says[found.equal]}", highlight=False, soft_wrap=True)
    out.print(f"delta: {found.delta}", highlight=False, soft_wrap=True)
    if found.equal is False and not found.rounded:
        raise typer.Exit(1)


def _words(result: "TuneResult") -> list[str]:
    cost = result.cost
    return [
        f"{result.num_segments} segments of {result.num_members} members in {result.seconds:.0f} s; "
        f"{result.num_exploits} exploits, {result.num_perturbations} perturbations, "
        f"{result.num_replaced} members replaced, {result.num_failures} failed attempts",
        f"cost: {cost.tokens:,} tokens, {cost.cpu_s:,.0f} CPU and {cost.gpu_s:,.0f} GPU seconds; "
        f"all members to the end: {cost.tokens_to_the_end:,} tokens, {cost.cpu_s_to_the_end:,.0f} CPU seconds "
        f"({cost.saved:.0%} saved)",
        f"winner: member {result.member}, {result.metric} {result.score:.4f}, {result.config}",
    ]


def _check_name(name: str) -> None:
    from ftray.core.errors import ConfigError
    from ftray.core.types import is_name

    if name and not is_name(name):
        raise ConfigError(f"--publish: {name!r} is refused; use a-z, 0-9, `.`, `_`, `-`")


def _publish(result: "TuneResult", name: str, registry: str, parity: bool) -> None:
    from ftray.cli.screen import bar
    from ftray.tune.publish import publish

    with bar(MEASURING):
        entry = publish(result, name, registry, parity=parity)
    for line in published_lines(entry):
        typer.echo(line)
