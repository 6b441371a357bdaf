"""A data set in a store: the windows that can be read while it is made, and the manifest once it is whole.

<split>-<digest>/window-<shards>-<number>.json   shards in their order, as far as they are made
<split>-<digest>/quarantine.jsonl                rows that cannot be used
<split>-<digest>/manifest.json                   everything; written last
<split>-<digest>/stamps.json                     sizes and times of the shards when they were last known good
"""

import contextlib
import os
import posixpath
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftray.core.errors import DataError
from ftray.data.counts import Counts, counts_of
from ftray.data.pairs import are_pairs
from ftray.data.quarantine import Records
from ftray.data.read import MANIFEST, STAMPS, window_name
from ftray.data.store import Folder, Store, each_of, open_store, split_folder
from ftray.data.work import Outcome

QUARANTINE = "quarantine.jsonl"
READER = "reader.json"
"""How far a run has come that reads the data set while it grows."""


PREPARING = "preparing.json"
"""Who prepares the data set, and when this was said last; not there when nobody does."""
STALE_S = 2 * 3600.0
"""Who has not said so for this long prepares it no more."""
_TELL_EVERY_S = 600.0
USED = "used.json"
"""When it was used last, and by which runs."""


def mark_used(folder: Folder, run_dir: Path | None = None) -> None:
    """Tell whoever clears the cache that a data set is in use, and by which run."""
    parent, name = split_folder(folder)
    store = open_store(parent)
    known = store.read_json(f"{name}/{USED}") or {}
    runs = {*known.get("runs", []), *([str(run_dir.absolute())] if run_dir else [])}
    store.write_json(f"{name}/{USED}", {"at": time.time(), "runs": sorted(runs)})


class Dataset:
    """The files of one data set.

    Args:
        store: where it and its shards are.
        name: its folder in the store.
        identity: everything its content depends on, with a `digest` that leaves out where files lie.
        window_shards: shards in a window.
    """

    def __init__(self, store: Store, name: str, identity: dict[str, Any], window_shards: int) -> None:
        self.store, self.name, self.identity, self.window_shards = store, name, identity, window_shards
        self._source_number = {source["file"]: number for number, source in enumerate(identity["sources"])}

    @property
    def folder(self) -> Folder:
        """Where it is, as a user would write it."""
        return self.store.folder(self.name)

    def is_whole(self) -> bool:
        """True if the manifest is committed and no shard has changed since it was last known good."""
        manifest = self.store.read_json(f"{self.name}/{MANIFEST}")
        if not isinstance(manifest, dict):
            return False
        stamps = self._stamps(manifest["shards"])
        return None not in stamps.values() and bool(self.store.read_json(f"{self.name}/{STAMPS}") == stamps)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Says for the time of a block that the data set is being prepared, and now and then that it still is."""
        done = threading.Event()

        def tell() -> None:
            self.store.write_json(
                f"{self.name}/{PREPARING}",
                {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()},
            )

        def go_on_telling() -> None:
            while not done.wait(_TELL_EVERY_S):
                with contextlib.suppress(DataError, OSError):  # what stops the preparation tells better
                    tell()

        tell()
        thread = threading.Thread(target=go_on_telling, name="ftray-preparing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.store.remove(f"{self.name}/{PREPARING}")

    def forget(self) -> None:
        """Remove the manifest and the windows of an earlier preparation, whose shards may be gone."""
        self.store.remove(f"{self.name}/{MANIFEST}")
        self.store.remove(f"{self.name}/{READER}")
        number = 0
        while self.store.stamp(name := f"{self.name}/{window_name(self.window_shards, number)}") is not None:
            self.store.remove(name)
            number += 1

    def write_window(self, number: int, shards: Sequence[dict[str, Any]], counts: dict[str, Any]) -> None:
        """Let readers have a window before the rest is made; the first one says what the data set is made of."""
        kept = ("format_version", "digest", "max_length")
        content = {
            **(self.identity if number == 0 else {key: self.identity[key] for key in kept}),
            "pairs": are_pairs(counts, self.folder),
            "counts": counts,
            "shards": list(shards),
        }
        self.store.write_json(f"{self.name}/{window_name(self.window_shards, number)}", content)

    def rows_read(self) -> int:
        """Rows that a reader has asked for so far."""
        told = self.store.read_json(f"{self.name}/{READER}")
        return int(told["rows"]) if told else 0

    def entries(self, outcome: Outcome) -> list[dict[str, Any]]:
        """The manifest entries of a unit's shards, with the number of its source."""
        source = self._source_number[outcome.unit.file]
        return [{**shard, "source": source} for shard in outcome.shards]

    def commit(self, outcomes: Sequence[Outcome], records: Records) -> None:
        """Write the quarantined rows and the manifest of a data set whose units are all prepared."""
        self.write_quarantine(outcomes, records)
        shards = [entry for outcome in outcomes for entry in self.entries(outcome)]
        stamps = self._stamps(shards)
        counts = counts_of(outcomes, self.identity["max_length"])
        content = {
            **self.identity,
            "pairs": are_pairs(counts, ", ".join(source["file"] for source in self.identity["sources"][:3])),
            "counts": counts,
            "source_counts": self._by_source(outcomes),
            "shards": shards,
        }
        self.store.write_json(f"{self.name}/{MANIFEST}", content)
        self.store.write_json(f"{self.name}/{STAMPS}", stamps)

    def write_quarantine(self, outcomes: Sequence[Outcome], records: Records) -> None:
        """Write the rows of some units, in their order, that cannot be used."""
        with (
            self.store.writing(f"{self.name}/{QUARANTINE}") as path,
            path.open("w", encoding="utf-8") as file,
        ):
            file.writelines(records.lines(outcomes))

    def check_counts(self, patterns: Sequence[str], max_quarantine: float) -> None:
        """Refuse a data set with nothing in it or with too many quarantined rows."""
        counts = self.store.read_json(f"{self.name}/{MANIFEST}")["counts"]
        where = ", ".join(patterns[:3]) + (", ..." if len(patterns) > 3 else "")
        if counts["rows"] == 0:
            raise DataError(f"{where}: there are no rows; check the files")
        if sum(counts["quarantined"].values()) > max_quarantine * counts["rows"]:
            raise self.too_many(patterns, max_quarantine, counts["rows"], counts["quarantined"])
        if counts["packed_rows"] == 0:
            rules = ", ".join(f"{rule} {n}" for rule, n in counts["filtered"].items())
            raise DataError(f"{where}: no row is left after the transforms (filtered: {rules}); relax them")

    def too_many(
        self, patterns: Sequence[str], max_quarantine: float, rows: int, quarantined: Mapping[str, int]
    ) -> DataError:
        """What is said of rows that cannot be used; `quarantined` counts them by reason, the commonest first."""
        where = ", ".join(patterns[:3]) + (", ..." if len(patterns) > 3 else "")
        reasons = "; ".join(f"{reason} ({n}x)" for reason, n in list(quarantined.items())[:3])
        return DataError(
            f"{where}: {sum(quarantined.values())} of {rows} rows cannot be used, more than max_quarantine "
            f"{max_quarantine:g} allows: {reasons}; see {self.store.folder(f'{self.name}/{QUARANTINE}')}"
        )

    def _stamps(self, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = {shard["file"]: posixpath.normpath(f"{self.name}/{shard['file']}") for shard in shards}
        return dict(zip(names, each_of(self.store, self.store.stamp, list(names.values())), strict=True))

    def _by_source(self, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
        """Counts of each source file, in the order of the sources."""
        parts: dict[str, list[Outcome]] = {source["file"]: [] for source in self.identity["sources"]}
        for outcome in outcomes:
            parts[outcome.unit.file].append(outcome)
        return [counts_of(part, self.identity["max_length"]) for part in parts.values()]


class Prefix:
    """Collects outcomes in any order and writes each window once all units before its end are there.

    Args:
        dataset: whose windows they are.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._waiting: dict[int, Outcome] = {}
        self._units, self._counts = 0, Counts()
        self._shards: list[dict[str, Any]] = []
        self._windows = 0
        self._starts = [0]

    def windows_ahead(self) -> int:
        """Written windows that no reader has come to."""
        read = self.dataset.rows_read()
        return sum(start >= read for start in self._starts[:-1])

    def add(self, outcome: Outcome) -> None:
        """Take one outcome; each is taken once."""
        self._waiting[outcome.unit.index] = outcome
        while (found := self._waiting.pop(self._units, None)) is not None:
            self._units += 1
            self._counts.add(found)
            self._shards += self.dataset.entries(found)
            size = self.dataset.window_shards
            while len(self._shards) >= size:
                window, self._shards = self._shards[:size], self._shards[size:]
                counts = self._counts.content(self.dataset.identity["max_length"])
                self.dataset.write_window(self._windows, window, counts)
                self._starts.append(self._starts[-1] + sum(shard["rows"] for shard in window))
                self._windows += 1
