"""`ftray jobs`: list, watch and stop what was submitted."""

import time
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, watch and stop submitted jobs.")

Address = Annotated[str | None, typer.Option(help="Dashboard of the cluster, http://host:8265.")]
JobId = Annotated[str, typer.Argument(help="The id that `ftray submit` printed.")]


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """The jobs of the cluster, the newest first."""
    from ftray.cluster.ray_jobs import Jobs

    jobs = Jobs(address).list()
    width = max([len(job.id) for job in jobs], default=2)
    typer.echo(f"{'ID':<{width}}  {'STATUS':<9}  {'STARTED':<19}  COMMAND")
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_s)) if job.started_s else ""
        typer.echo(f"{job.id:<{width}}  {job.status:<9}  {started:<19}  {job.command}")


@app.command()
def status(job_id: JobId, address: Address = None) -> None:
    """Whether a job waits, runs or has ended, and how."""
    from ftray.cluster.ray_jobs import Jobs

    job = Jobs(address).status(job_id)
    typer.echo(f"{job.status}  {job.message}".rstrip())


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = None,
) -> None:
    """What a job has printed."""
    from ftray.cluster.ray_jobs import Jobs

    jobs = Jobs(address)
    if follow:
        jobs.follow(job_id, lambda text: typer.echo(text, nl=False))
    else:
        typer.echo(jobs.logs(job_id), nl=False)


@app.command()
def stop(job_id: JobId, address: Address = None) -> None:
    """Ask a job to end."""
    from ftray.cluster.ray_jobs import Jobs

    typer.echo("stopping" if Jobs(address).stop(job_id) else "it had already ended")
