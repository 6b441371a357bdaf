"""Source files to a committed folder of token shards, their manifest and the quarantined rows.

The folder's name is a digest of everything that decides its content, so unchanged input is prepared once.
Rows in = documents + filtered + quarantined, always.
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.fs import commit_dir, digest_file, digest_json, write_json
from ftray.core.spec import dump
from ftray.core.types import Progress, no_progress
from ftray.data.read import FORMAT_VERSION, MANIFEST, read_manifest
from ftray.data.source import UNIT_BYTES, Unit, find_files, split_units
from ftray.data.tokenise import Tokeniser, tokeniser
from ftray.data.transform.base import Barrier, Mask
from ftray.data.work import Outcome, Plan, Runner, Task, run_here, work_on

Split = Literal["train", "validation"]
QUARANTINE = "quarantine.jsonl"


def prepare_local(
    data: DataConfig, tokenizer_folder: str, split: Split = "train", progress: Progress = no_progress
) -> Path:
    """Prepare one split in this process; returns the folder, which `Shards` reads.

    Args:
        data: sources, transforms and sizes.
        tokenizer_folder: a tokenizer or model folder, or a Hub id.
        split: which of the configured sources.
        progress: called with the source bytes done and their total.

    Raises:
        DataError: one line: a file is missing, no row is left, or too many rows are quarantined.
    """
    return prepare_with(run_here, data, tokenizer_folder, split, progress)


def prepare_with(
    run: Runner, data: DataConfig, tokenizer_folder: str, split: Split, progress: Progress
) -> Path:
    """Prepare one split, the work on units done by `run`; the result does not depend on it."""
    patterns = data.train if split == "train" else data.validation
    if not patterns:
        raise DataError(f"data.{split}: names no file; add paths or globs of JSON lines")
    files = find_files(patterns)
    # Workers on other nodes start elsewhere, so what is a path is made absolute; a Hub id stays as it is.
    local = Path(tokenizer_folder).expanduser()
    tok = tokeniser(str(local.absolute()) if local.is_dir() else str(tokenizer_folder))
    identity = _identity(data, files, tok)
    final = Path(data.cache_dir).expanduser() / f"{split}-{digest_json(identity).removeprefix('xxh3:')[:16]}"
    if not (final / MANIFEST).is_file():
        try:
            with commit_dir(final) as folder:
                plan = _plan(data, tok, folder)
                outcomes = _run_units(run, plan, split_units(files, UNIT_BYTES), progress)
                _write_manifest(folder, identity, outcomes)
        except FileExistsError:
            pass  # another process prepared the same meanwhile; equal input, equal shards
    _check_counts(final, patterns, data.max_quarantine)
    return final


def _identity(data: DataConfig, files: Sequence[Path], tok: Tokeniser) -> dict[str, Any]:
    """Everything the shards and the quarantine depend on."""
    return {
        "format_version": FORMAT_VERSION,
        "sources": [_source(file) for file in files],
        "unit_bytes": UNIT_BYTES,
        "transforms": dump(data.transforms),
        "max_length": data.max_length,
        "packing": data.packing,
        "overlong": data.overlong,
        "tokenizer": tok.digest,
        "chat_template_hash": tok.template_digest,
    }


def _source(file: Path) -> dict[str, Any]:
    try:
        return {"file": str(file), "size_bytes": file.stat().st_size, "digest": digest_file(file)}
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from None


def _plan(data: DataConfig, tok: Tokeniser, folder: Path) -> Plan:
    return Plan(
        transforms=tuple(data.transforms),
        tokenizer_folder=tok.folder,
        max_length=data.max_length,
        packing=data.packing,
        overlong=data.overlong,
        folder=folder.absolute(),
    )


def _run_units(run: Runner, plan: Plan, units: Sequence[Unit], progress: Progress) -> list[Outcome]:
    """Outcomes of all units in their order; one pass for each barrier, then the final one."""
    barriers = [transform for transform in plan.transforms if isinstance(transform, Barrier)]
    total = sum(unit.stop - unit.start for unit in units) * (len(barriers) + 1)
    work, done = functools.partial(work_on, plan), 0
    masks: list[tuple[Mask, ...]] = [() for _ in units]
    progress(0, total)
    for barrier in [*barriers, None]:
        tasks = [Task(unit, mask, barrier is None) for unit, mask in zip(units, masks, strict=True)]
        outcomes: list[Outcome] = []
        for outcome in run(work, tasks):
            outcomes.append(outcome)
            done += outcome.unit.stop - outcome.unit.start
            progress(done, total)
        outcomes.sort(key=lambda outcome: outcome.unit.index)
        if barrier is not None:
            decided = barrier.keep([outcome.keys or [] for outcome in outcomes])
            masks = [(*known, new) for known, new in zip(masks, decided, strict=True)]
    return outcomes


def _write_manifest(folder: Path, identity: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    quarantined = _file_lines(outcomes)
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in quarantined)
    filtered = sum((outcome.filtered for outcome in outcomes), Counter[str]())
    changed = sum((outcome.changed for outcome in outcomes), Counter[str]())
    shards = [outcome.shard for outcome in outcomes if outcome.shard]
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise DataError(
                f"{folder.parent}: a shard written by another node is not here; "
                "set data.cache_dir to storage that all nodes share"
            )
    counts = {
        "rows": sum(outcome.rows for outcome in outcomes),
        "documents": sum(outcome.documents for outcome in outcomes),
        "split_documents": sum(outcome.split for outcome in outcomes),
        "truncated_documents": sum(outcome.truncated for outcome in outcomes),
        "filtered": dict(sorted(filtered.items())),
        "changed": dict(sorted(changed.items())),
        "quarantined": dict(Counter(record["reason"] for record in quarantined).most_common()),
        "packed_rows": sum(shard["rows"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "targets": sum(shard["targets"] for shard in shards),
    }
    assert counts["rows"] == counts["documents"] + filtered.total() + len(quarantined), counts
    # Where a file lies is not part of what the data are.
    sources = [{"digest": source["digest"]} for source in identity["sources"]]
    digest = digest_json({**identity, "sources": sources, "shards": shards, "counts": counts})
    write_json(folder / MANIFEST, {**identity, "counts": counts, "shards": shards, "digest": digest})


def _file_lines(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Quarantine records with line numbers within the file, from 1."""
    records = []
    before: Counter[str] = Counter()
    for outcome in outcomes:
        first = before[outcome.unit.file] + 1
        found = sorted(outcome.quarantined, key=lambda record: record["offset"])
        records += [{**record, "line": record["line"] + first} for record in found]
        before[outcome.unit.file] += outcome.lines
    return records


def _check_counts(folder: Path, patterns: Sequence[str], max_quarantine: float) -> None:
    """Refuse a data set with nothing in it or with too many quarantined rows."""
    counts = read_manifest(folder)["counts"]
    where = ", ".join(patterns[:3]) + (", ..." if len(patterns) > 3 else "")
    if counts["rows"] == 0:
        raise DataError(f"{where}: there are no rows; check the files")
    bad = sum(counts["quarantined"].values())
    if bad > max_quarantine * counts["rows"]:
        reasons = "; ".join(f"{reason} ({n}x)" for reason, n in list(counts["quarantined"].items())[:3])
        raise DataError(
            f"{where}: {bad} of {counts['rows']} rows cannot be used, more than max_quarantine "
            f"{max_quarantine:g} allows: {reasons}; see {folder / QUARANTINE}"
        )
    if counts["packed_rows"] == 0:
        rules = ", ".join(f"{rule} {n}" for rule, n in counts["filtered"].items())
        raise DataError(f"{where}: no row is left after the transforms (filtered: {rules}); relax them")
