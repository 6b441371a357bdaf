"""What is in source files and in prepared shards, as plain numbers for a person to look at."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftray.core.types import Progress, no_progress
from ftray.data.pairs import SIDES
from ftray.data.read import IGNORE_INDEX, Shards
from ftray.data.rows import BadRow
from ftray.data.source import Records, SampleBy, find_sources, parse_record, split_units
from ftray.data.transform.read_time import ReadTime


@dataclass
class FileReport:
    """One source file."""

    file: str
    """Its path."""
    size_bytes: int
    """Its size."""
    rows: int = 0
    """Rows in it (lines that are not blank)."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Rows by shape."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be used, by reason."""
    first_bad_line: int | None = None
    """Number of the first of them, from 1: of its line, or its row where there are no lines."""
    place: str = "line"
    """What is counted in the file: lines or rows."""
    chars: int = 0
    """Characters of text in the usable rows."""


def inspect_files(
    patterns: Sequence[str],
    progress: Progress = no_progress,
    *,
    columns: Mapping[str, str] | None = None,
    sample_by: SampleBy = "document",
) -> list[FileReport]:
    """Read source files as preparation would and report on each.

    Args:
        patterns: files, globs, folders, URLs or Hub ids.
        progress: called with the source bytes done and their total.
        columns: as in `DataConfig`.
        sample_by: as in `DataConfig`.

    Raises:
        DataError: one line, for a missing one.
    """
    sources = find_sources(patterns, sample_by)
    reports = {source.file: FileReport(source.file, source.size_bytes) for source in sources}
    for source in sources:
        reports[source.file].place = "line" if source.format in ("jsonl", "line") else "row"
    lines_before: Counter[str] = Counter()
    done = 0
    for unit in split_units(sources):
        report, records = reports[unit.file], Records(unit, columns)
        for record in records:
            report.rows += 1
            try:
                row = parse_record(unit, record, columns)
            except BadRow as error:
                report.bad[str(error)] += 1
                report.first_bad_line = report.first_bad_line or lines_before[unit.file] + record.number + 1
                continue
            report.shapes[row.shape] += 1
            report.chars += sum(len(span.text) for span in row.spans)
        lines_before[unit.file] += records.lines
        done += unit.stop - unit.start
        progress(done, sum(source.size_bytes for source in sources))
    return list(reports.values())


@dataclass(frozen=True)
class Document:
    """One document of a prepared data set."""

    token_ids: list[int]
    """Its tokens."""
    is_target: list[bool]
    """Which of them the model learns to produce."""
    weights: list[float]
    """Weight of each in the loss."""
    side: str = ""
    """`chosen` or `rejected` in a preference pair."""


def documents(shards: Shards, read: ReadTime | None = None) -> Iterator[Document]:
    """The documents of a prepared data set in the order they are stored.

    Args:
        shards: the data set.
        read: changes rows as the first epoch of a run does.
    """
    for index in range(len(shards)):
        row = shards.row(index) if read is None else read(shards.row(index), index, 0)
        cuts = np.cumsum(row.doc_lens)[:-1]
        columns = (np.split(column, cuts) for column in (row.input_ids, row.labels, row.weights))
        places = [side for size in row.group_lens for side in (SIDES if size == len(SIDES) else ("",))]
        for side, ids, labels, weights in zip(places, *columns, strict=True):
            yield Document(ids.tolist(), (labels != IGNORE_INDEX).tolist(), weights.tolist(), side)
