"""Rows as their files give them, in our order, for a trainer that tokenises itself."""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import numpy as np

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.fs import digest_bytes
from ftray.data.fingerprint import fingerprints
from ftray.data.order import Permutation
from ftray.data.shapes import FIELDS
from ftray.data.source import Records, find_sources, split_units
from ftray.data.spans import BadRow
from ftray.data.store import open_store

RawRow = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RawRows:
    """The rows of a split."""

    rows: list[RawRow]
    """In the order of the first epoch, the same on every worker."""
    quarantined: dict[str, int]
    """Rows that cannot be used, counted by reason."""
    digest: str
    """Of the rows' content in their order."""
    sources: list[dict[str, Any]]
    """The files they come from, each with its digest."""


def read_rows(data: DataConfig, split: str, seed: int, columns: Collection[str] = ()) -> RawRows:
    """Read a split's rows into memory: no transforms, no tokens, columns renamed as `data.columns` says.

    Args:
        data: sources, columns and how many bad rows are borne.
        split: `train` or `validation`.
        seed: of the order.
        columns: columns of columnar files to read besides those that known shapes of rows have.

    Raises:
        DataError: if no row is left, or too many cannot be used.
    """
    renamed = {found: str(name) for name, found in data.columns.items()}
    names = {name: name for name in (*FIELDS, *renamed, *columns)}
    rows: list[RawRow] = []
    bad: dict[str, int] = {}
    sources = find_sources(getattr(data, split), data.sample_by)
    for unit in split_units(sources):
        for record in Records(unit, names):
            row = _as_row(record.value)
            if isinstance(row, str):
                bad[row] = bad.get(row, 0) + 1
            else:
                rows.append({renamed.get(name, name): value for name, value in row.items()})
    total = len(rows) + sum(bad.values())
    if not rows or sum(bad.values()) > data.max_quarantine * total:
        reason = max(bad, key=lambda key: bad[key]) if bad else "the files are empty"
        raise DataError(
            f"data.{split}: {total - len(rows)} of {total} rows cannot be used; most often: {reason}"
        )
    order = Permutation(len(rows), seed, epoch=0)(np.arange(len(rows)))
    ordered = [rows[index] for index in order.tolist()]
    lines = (json.dumps(row, sort_keys=True, default=str) for row in ordered)
    files = fingerprints([source.file for source in sources], open_store(data.cache_dir))
    return RawRows(ordered, bad, digest_bytes("\n".join(lines).encode()), files)


def _as_row(value: Any) -> RawRow | str:
    """The row, or why it is none."""
    if isinstance(value, BadRow):
        return str(value)
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except ValueError:
            return "not JSON"
    return value if isinstance(value, dict) else "not an object with fields"
