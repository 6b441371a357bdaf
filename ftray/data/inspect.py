"""What is in source files and in prepared shards, as plain numbers for a person to look at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ftray.core.types import Progress, no_progress
from ftray.data.read import IGNORE_INDEX, Shards
from ftray.data.rows import BadRow, parse_line
from ftray.data.source import find_files, read_lines, split_units


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
    """Line number of the first of them, from 1."""
    chars: int = 0
    """Characters of text in the usable rows."""


def inspect_files(patterns: Sequence[str], progress: Progress = no_progress) -> list[FileReport]:
    """Read source files as preparation would and report on each. Raises `DataError` for a missing one."""
    reports: dict[str, FileReport] = {}
    lines_before: Counter[str] = Counter()
    files = find_files(patterns)
    sizes = {str(file): file.stat().st_size for file in files}
    done = 0
    for file, size in sizes.items():
        reports[file] = FileReport(file, size)
    for unit in split_units(files):
        report = reports[unit.file]
        lines, number = read_lines(unit)
        for line in lines:
            report.rows += 1
            try:
                row = parse_line(line.content)
            except BadRow as error:
                report.bad[str(error)] += 1
                report.first_bad_line = report.first_bad_line or lines_before[unit.file] + line.number + 1
                continue
            report.shapes[row.shape] += 1
            report.chars += sum(len(span.text) for span in row.spans)
        lines_before[unit.file] += number
        done += unit.stop - unit.start
        progress(done, sum(sizes.values()))
    return list(reports.values())


@dataclass(frozen=True)
class Document:
    """One document of a prepared data set."""

    token_ids: list[int]
    """Its tokens."""
    is_target: list[bool]
    """Which of them the model learns to produce."""


def documents(shards: Shards) -> Iterator[Document]:
    """The documents of a prepared data set in the order they are stored."""
    for index in range(len(shards)):
        row = shards.row(index)
        cuts = np.cumsum(row.doc_lens)[:-1]
        for ids, labels in zip(np.split(row.input_ids, cuts), np.split(row.labels, cuts), strict=True):
            yield Document(ids.tolist(), (labels != IGNORE_INDEX).tolist())


def document_lens(folder: Path) -> np.ndarray:
    """Tokens of every document (or piece of a long one) of a prepared data set."""
    shards = Shards(folder)
    return np.concatenate([shards.row(index).doc_lens for index in range(len(shards))])
