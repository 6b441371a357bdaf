"""`ftray eval`."""

from typing import Annotated

import typer


def command(
    file: Annotated[str, typer.Argument(help="Evaluation file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `field=value`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Score the base and deltas on held-out rows."""
    import json

    from ftray.cli.screen import bar, out
    from ftray.config.evaluate import EvalConfig
    from ftray.config.load import load
    from ftray.eval.report import difference_table, score_table
    from ftray.eval.run import evaluate_config

    config = load(EvalConfig, file, overrides or [])
    with bar("evaluate") as progress:
        report = evaluate_config(config, progress)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
        return
    out.print(score_table(report))
    if report.differences:
        out.print(difference_table(report.differences))
    for bad in report.quarantined[:5]:
        where = f"{bad['file']} at byte {bad['offset']}"
        out.print(f"left out: {where}: {bad['reason']}", highlight=False, markup=False, soft_wrap=True)
    if report.quarantined:
        out.print(f"{len(report.quarantined)} rows left out", highlight=False)
    for note in report.notes:
        out.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if config.output:
        out.print(f"report: {config.output}", highlight=False, markup=False, soft_wrap=True)
