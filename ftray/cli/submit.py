"""`ftray submit`: a recipe or a job file, run on a Ray cluster."""

import importlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ftray.config.job import JobConfig
from ftray.config.load import load, read_yaml
from ftray.core.errors import ConfigError
from ftray.core.spec import parse

_CONFIGS = {
    "run": "ftray.config.recipe:Recipe",
    "tune": "ftray.config.tune:TuneConfig",
    "eval": "ftray.config.evaluate:EvalConfig",
    "serve": "ftray.config.serve:ServeConfig",
    "check": "ftray.config.recipe:Recipe",
}


def command(
    file: Annotated[Path, typer.Argument(help="A job file, or the file that the verb takes (a recipe).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="`a.b=c` for the file.")] = None,
    address: Annotated[str | None, typer.Option(help="Dashboard of the cluster, http://host:8265.")] = None,
    verb: Annotated[
        str, typer.Option(help="What runs if FILE is no job file: run, tune, eval, serve, check.")
    ] = "run",
    name: Annotated[str, typer.Option(help="Beginning of the job's id.")] = "",
    working_dir: Annotated[
        str, typer.Option(help="Folder to send, instead of the files that FILE names.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Show its output and end with it.")] = False,
) -> None:
    """Submit a recipe or a job file to a Ray cluster."""
    job = read_job(file, overrides or [], verb=verb, name=name, working_dir=working_dir)
    _check(job)

    from ftray.cluster.bundle import collect
    from ftray.cluster.ray_jobs import Jobs

    bundle = collect(job)
    for path in bundle.expected:
        typer.echo(f"note: {path} is not sent; it must be there on the cluster", err=True)
    if bundle.withheld:
        names = ", ".join(bundle.withheld)
        typer.echo(f"note: not sent, hidden or a secret by its name: {names}", err=True)
    jobs = Jobs(address)
    job_id = jobs.submit(job)
    typer.echo(job_id)
    if not wait:
        typer.echo(f"follow it with: ftray jobs logs {job_id} --follow --address {jobs.address}", err=True)
        return
    ended = jobs.follow(job_id, lambda text: typer.echo(text, nl=False))
    if ended.status != "SUCCEEDED":
        typer.echo(f"{job_id}: {ended.status} {ended.message}".strip(), err=True)
        raise typer.Exit(1)


def read_job(file: Path, overrides: list[str], *, verb: str, name: str, working_dir: str) -> JobConfig:
    """The job in a job file, or the job that runs `verb` on any other file."""
    data = read_yaml(file)
    if isinstance(data, dict) and "verb" in data:
        given = [f"name={name}"] * bool(name) + [f"working_dir={working_dir}"] * bool(working_dir)
        return load(JobConfig, file, [*overrides, *given])
    if verb not in _CONFIGS:
        raise ConfigError(f"--verb {verb!r} is refused; known: {', '.join(_CONFIGS)}")
    stem = re.sub(r"[^a-z0-9._-]", "-", file.stem.lower()).lstrip("._-")
    fields = {
        "name": name or f"{verb}-{stem}"[:48],
        "verb": verb,
        "config": str(file),
        "arguments": overrides,
        "working_dir": working_dir,
    }
    return parse(JobConfig, fields)


def _check(job: JobConfig) -> None:
    """Refuse here what the cluster would refuse later, unless only the cluster can expand the file."""
    if job.verb not in _CONFIGS or any(name not in os.environ for name in job.secrets):
        return
    module, _, attribute = _CONFIGS[job.verb].partition(":")
    config: Any = getattr(importlib.import_module(module), attribute)
    load(config, job.config, [argument for argument in job.arguments if not argument.startswith("-")])
