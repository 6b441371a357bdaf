"""`ftray data`: prepare a corpus and look at it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftray.config.recipe import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prepare a corpus and look at it.")

RecipeFile = Annotated[str, typer.Argument(help="Recipe file (YAML), as for `ftray run`.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")]
Files = Annotated[list[str], typer.Argument(help="Files, folders, globs, URLs or Hub ids.")]


@app.command()
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option(help="In this process, without Ray.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, or a local one.")
    ] = None,
) -> None:
    """Clean, tokenise and pack the rows of a recipe into token shards."""
    from contextlib import nullcontext

    from ftray.cli.screen import bar, out

    spec = _load(recipe, overrides)
    if local:
        from ftray.data.prepare import prepare_local as prepare_split

        session: Any = nullcontext()
    else:
        from ftray.cluster.ray_session import session as ray_session
        from ftray.data.ray_prepare import prepare as prepare_split

        session = ray_session(address)
    with session:
        for split in ("train", "validation"):
            if getattr(spec.data, split):
                with bar(f"prepare {split}") as progress:
                    folder = prepare_split(spec.data, spec.model.tokenizer, split, progress)
                _print_counts(folder)
                out.print(f"{split}: {folder}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    files: Files,
    column: Annotated[
        list[str] | None, typer.Option(help="Where rows hold what, as `prompt=question`; may be repeated.")
    ] = None,
    sample_by: Annotated[
        str, typer.Option(help="A row of plain text: `document`, `paragraph` or `line`.")
    ] = "document",
) -> None:
    """Show what source files hold: rows by shape, and why rows cannot be used."""
    from rich.table import Table

    from ftray.cli.screen import bar, out
    from ftray.config.recipe import DataConfig
    from ftray.core.spec import parse
    from ftray.data.inspect import inspect_files

    columns = dict(item.partition("=")[::2] for item in column or [])
    data = parse(DataConfig, {"train": files, "columns": columns, "sample_by": sample_by}, "options")
    with bar("read") as progress:
        reports = inspect_files(
            data.train, progress, columns=dict(data.columns.items()), sample_by=data.sample_by
        )
    table = Table("file", "MB", "rows", "shapes", "characters per row", "cannot be used", box=None)
    for report in reports:
        usable = report.shapes.total()
        table.add_row(
            report.file,
            f"{report.size_bytes / 1e6:.1f}",
            f"{report.rows:,}",
            ", ".join(f"{shape} {count:,}" for shape, count in report.shapes.most_common()),
            f"{report.chars / usable:,.0f}" if usable else "",
            str(report.bad.total()),
        )
    out.print(table)
    for report in reports:
        for reason, count in report.bad.most_common(3):
            where = f"{report.file} (first at {report.place} {report.first_bad_line})"
            out.print(f"{where}: {count:,}x {reason}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Documents to show.")] = 3,
    validation: Annotated[bool, typer.Option(help="Of the validation rows.")] = False,
) -> None:
    """Print documents token by token: green is learnt (yellow: with another weight than 1), dim is context.

    Read-time transforms are drawn as in the first epoch. Tokens take turns in brightness; special tokens are
    underlined. Without colours, what is learnt is put in ⟦ ⟧.
    """
    from itertools import islice

    from ftray.cli.screen import bar, out
    from ftray.cli.tokens import shown
    from ftray.data.inspect import documents
    from ftray.data.prepare import prepare_local
    from ftray.data.read import Shards
    from ftray.data.tokenise import tokeniser
    from ftray.data.transform.read_time import ReadTime

    spec = _load(recipe, overrides)
    with bar("prepare") as progress:
        folder = prepare_local(
            spec.data, spec.model.tokenizer, "validation" if validation else "train", progress
        )
    tok, shards = tokeniser(spec.model.tokenizer), Shards(folder)
    pairs = bool(shards.manifest["pairs"])
    read = ReadTime(spec.data.read_transforms, spec.seed, pairs=pairs, validation=validation)
    for document in islice(documents(shards, read), rows):
        title = f"{document.side}: " if document.side else ""
        out.rule(f"{title}{len(document.token_ids)} tokens, {sum(document.is_target)} targets", align="left")
        out.print(shown(document, tok, marks=out.color_system is None), soft_wrap=True)


@app.command()
def stats(
    folder: Annotated[str, typer.Argument(help="Folder or URL that `ftray data prepare` printed.")],
    png: Annotated[
        Path | None, typer.Option(help="Where the picture goes; default: lengths.png in a local folder.")
    ] = None,
) -> None:
    """Numbers of a prepared data set by source: rows, tokens, targets, lengths, duplicates, rejects by reason."""
    import numpy as np
    from rich.table import Table

    from ftray.cli.screen import out
    from ftray.data.stats import measure, plot_lengths
    from ftray.data.store import is_url

    found = measure(folder)
    _print_counts(folder)
    names = ("rows", "documents", "tokens", "targets")
    table = Table("source", *names, "filtered", "quarantined", box=None)
    for source in found.sources:
        rejects = (sum(source[kind].values()) for kind in ("filtered", "quarantined"))
        table.add_row(source["file"], *(f"{n:,}" for n in (*(source[name] for name in names), *rejects)))
    out.print(table, highlight=False)
    if len(found.lens):
        marks = np.percentile(found.lens, [0, 50, 90, 99, 100]).astype(int).tolist()
        titles = ("shortest", "median", "90 %", "99 %", "longest")
        shown = ", ".join(f"{title} {mark:,}" for title, mark in zip(titles, marks, strict=True))
        out.print(f"tokens per document: {shown}", highlight=False)
        out.print(f"repeated documents: {found.duplicates:,}", highlight=False)
        for side, targets in found.targets_by_side.items():
            marks = np.percentile(targets, [50, 90]).astype(int).tolist()
            out.print(f"target tokens of {side}: median {marks[0]:,}, 90 % {marks[1]:,}", highlight=False)
        picture = plot_lengths(found, png or Path("." if is_url(folder) else folder) / "lengths.png")
        out.print(f"histogram: {picture}", highlight=False, soft_wrap=True)


@app.command()
def export(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="File of JSON lines to make.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Which part: `train`, `validation` or `test`.")] = "test",
) -> None:
    """Write the rows of a part of the corpus, as they are after the transforms: held-out rows for `ftray eval`."""
    from typing import get_args

    from ftray.cli.screen import bar
    from ftray.cli.screen import out as screen
    from ftray.core.errors import ConfigError
    from ftray.data.export import Part
    from ftray.data.export import export as write

    if split not in get_args(Part):
        raise ConfigError(f"--split: {split!r} is no part; known: {', '.join(get_args(Part))}")
    spec = _load(recipe, overrides)
    with bar("read") as progress:
        count = write(spec.data, spec.model.tokenizer, split, out, progress)  # type: ignore[arg-type]
    screen.print(f"{count:,} rows: {out}", highlight=False, soft_wrap=True)


@app.command()
def gc(
    cache_dir: Annotated[
        str, typer.Argument(help="`data.cache_dir` of your recipes.")
    ] = "~/.cache/ftray/data",
    days: Annotated[float, typer.Option(min=0, help="What was used in so many days stays.")] = 30,
    remove: Annotated[bool, typer.Option("--remove", help="Remove it; otherwise it is only listed.")] = False,
) -> None:
    """Find prepared data that no run uses and nothing has used for some days."""
    from ftray.cli.screen import out
    from ftray.data.gc import find_garbage

    found = find_garbage(cache_dir, days)
    for folder in found.datasets:
        out.print(str(folder), highlight=False, soft_wrap=True)
    size = f"{found.size_bytes / 1e6:,.1f} MB"
    what = f"{len(found.datasets)} data sets and {len(found.files)} files of shards, {size}"
    if remove:
        found.remove()
        out.print(f"removed: {what}; {found.kept} data sets stay", highlight=False)
    else:
        out.print(f"not needed: {what}; {found.kept} data sets stay; `--remove` removes it", highlight=False)


@app.command()
def tokenizer(
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    vocab_size: Annotated[int, typer.Option(min=258, help="Tokens.")] = 4096,
) -> None:
    """Train a byte-level BPE tokenizer with a chat template on the text of some rows."""
    from ftray.cli.screen import bar
    from ftray.cli.screen import out as screen
    from ftray.data.train_tokenizer import train_tokenizer

    with bar("train tokenizer") as progress:
        bad = train_tokenizer(files, out, vocab_size, progress)
    left_out = f" ({bad:,} rows cannot be used and were left out; see `ftray data inspect`)" if bad else ""
    screen.print(f"tokenizer: {out}{left_out}", highlight=False, soft_wrap=True)


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from ftray.config.load import load
    from ftray.config.recipe import Recipe

    return load(Recipe, recipe, overrides or [])


def _print_counts(folder: Path | str) -> None:
    from rich.table import Table

    from ftray.cli.screen import out
    from ftray.data.prepare import QUARANTINE
    from ftray.data.read import read_manifest

    manifest = read_manifest(folder)
    counts = manifest["counts"]
    table = Table(box=None, show_header=False)
    for name in ("rows", "documents", "pairs", "split_documents", "packed_rows", "tokens", "targets"):
        table.add_row(name.replace("_", " "), f"{counts[name]:,}")
    full = counts["tokens"] / max(1, counts["packed_rows"] * manifest["max_length"])
    table.add_row("rows filled", f"{full:.2%}")
    table.add_row("split documents", f"{counts['split_documents_fraction']:.2%}")
    for rule, count in counts["filtered"].items():
        table.add_row(f"filtered by {rule}", f"{count:,}")
    for rule, count in counts["changed"].items():
        table.add_row(f"changed by {rule}", f"{count:,}")
    for reason, count in counts["quarantined"].items():
        table.add_row(f"quarantined: {reason}", f"{count:,}")
    out.print(table, highlight=False)
    if counts["quarantined"]:
        out.print(f"quarantined rows: {folder}/{QUARANTINE}", highlight=False, soft_wrap=True)
