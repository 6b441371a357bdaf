"""`ftray generate`: batch inference of a JSON lines file through a base or a delta."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[Path, typer.Argument(help="Rows: `prompt` or `messages`, one JSON object a line.")],
    output: Annotated[Path, typer.Argument(help="Where the answers go, in the order of the rows.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base model.")],
    delta: Annotated[str, typer.Option(help="Delta folder, or `name@version` of the registry.")] = "",
    registry: Annotated[str, typer.Option(help="Folder or URL of the registry.")] = "registry",
    engine: Annotated[str, typer.Option(help="Engine, as in a serve file (YAML).")] = "torch",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends an answer; may be repeated.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Engines that run at once.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each engine.")] = 0.0,
    address: Annotated[str, typer.Option(help="Ray cluster; else RAY_ADDRESS or this machine.")] = "",
) -> None:
    """Batch inference of a JSON lines file."""
    from ftray.cli.screen import bar, out
    from ftray.cluster.ray_session import session
    from ftray.config.load import parse_yaml
    from ftray.core.spec import build_piece
    from ftray.engine.api import Sampling
    from ftray.engine.ray_generate import Job, generate
    from ftray.model.folder import resolve_folder
    from ftray.registry.registry import Registry

    _check_output(source, output)
    folder: str | None = None
    if delta:
        is_folder = Path(delta).is_dir()
        folder = str(Path(delta).resolve() if is_folder else Registry(registry).resolve(delta).path.resolve())
    job = Job(
        base=str(resolve_folder(base)),
        engine=build_piece("engine", parse_yaml(engine, "--engine")),
        delta=folder,
        sampling=Sampling(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ())
        ),
    )
    with session(address or None), bar(f"generate {source.name}") as progress:
        done = generate(job, source, output, num_workers=num_workers, num_gpus=num_gpus, progress=progress)
    out.print(f"{done.output}: {done.num_rows} rows answered", highlight=False, soft_wrap=True)
    if done.quarantine:
        text = f"{done.quarantine}: {done.num_quarantined} rows quarantined, each with its reason"
        out.print(text, highlight=False, soft_wrap=True)


def _check_output(source: Path, output: Path) -> None:
    """Refuse to replace the rows by their answers, or by the quarantine that lies beside the answers."""
    from ftray.core.errors import DataError
    from ftray.data.source import find_files

    written = {path.resolve() for path in (output, output.with_name(output.name + ".quarantine.jsonl"))}
    for file in find_files([str(source)]):
        if file.resolve() in written:
            raise DataError(f"{output}: would replace the rows in {file}; name another output")
