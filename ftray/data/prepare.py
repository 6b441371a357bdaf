"""Source files to token shards, a manifest and the quarantined rows.

A data set is a manifest that names shards of the cache; its folder is named by a digest of everything that decides
its content. An unchanged corpus costs nothing, a new file costs only itself, a killed preparation goes on with the
units that are missing (`units.py`). Rows in = documents + filtered + quarantined, always.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NoReturn

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.fs import digest_json
from ftray.core.spec import dump
from ftray.core.types import Progress, no_progress
from ftray.data.dataset import QUARANTINE, Dataset, Prefix, mark_used
from ftray.data.fingerprint import fingerprints
from ftray.data.quarantine import QuarantineLimit, Records
from ftray.data.read import FORMAT_VERSION
from ftray.data.source import UNIT_BYTES, Unit, find_sources, split_units
from ftray.data.store import Folder, each_of, open_store
from ftray.data.tokenise import Tokeniser, tokeniser
from ftray.data.transform.base import Barrier, Decider, Mask
from ftray.data.transform.split import part_of
from ftray.data.units import load_outcome, prepare_unit, shard_name, unit_key
from ftray.data.work import BLOCK_CHARS, Outcome, Plan, Runner, Task, run_here

__all__ = ["QUARANTINE", "Preparation", "Split", "Stopped", "prepare_local", "prepare_with"]

Split = Literal["train", "validation"]


_WINDOWS_AHEAD = 2
_POLL_S = 0.1


class Stopped(Exception):
    """The preparation was asked to end before it was done; what it made stays."""


def prepare_local(
    data: DataConfig, tokenizer_folder: str, split: Split = "train", progress: Progress = no_progress
) -> Folder:
    """Prepare one split in this process; returns the folder (or URL), which `Shards` reads.

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
) -> Folder:
    """Prepare one split, the work on units done by `run`; the result does not depend on it."""
    return Preparation(data, tokenizer_folder, split).run(run, progress)


class Preparation:
    """One split of a corpus on its way to shards.

    Args:
        data: sources, transforms and sizes.
        tokenizer_folder: a tokenizer or model folder, or a Hub id.
        split: which of the configured sources.

    Raises:
        DataError: one line, if a source or the tokenizer cannot be read.
    """

    def __init__(self, data: DataConfig, tokenizer_folder: str, split: Split = "train") -> None:
        data = part_of(data, split)
        self.data, self.patterns = data, data.train if split == "train" else data.validation
        if not self.patterns:
            raise DataError(f"data.{split}: names no file; add paths, globs or URLs")
        found = find_sources(self.patterns, data.sample_by)
        tok = tokeniser(_absolute(tokenizer_folder))
        self.store = open_store(data.cache_dir)
        how = _how(data, tok)
        sources = [
            {**entry, "pattern": source.pattern}
            for entry, source in zip(fingerprints([s.file for s in found], self.store), found, strict=True)
        ]
        self.sources = {source["file"]: source for source in sources}
        # Where a file lies is not part of what the data are.
        contents = [[entry["digest"], source.sample] for entry, source in zip(sources, found, strict=True)]
        digest = digest_json({**how, "sources": contents})
        if data.drop_consumed:
            how["own_shards"] = True  # which go as they are read, though another data set may have equal ones
        identity = {**how, "sources": sources, "digest": digest}
        name = f"{split}-{digest_json(identity).removeprefix('xxh3:')[:16]}"
        self.dataset = Dataset(self.store, name, identity, data.window_shards)
        self.plan = Plan(
            transforms=tuple(data.prepare_transforms),
            tokenizer_folder=tok.folder,
            max_length=data.max_length,
            packing=data.packing,
            overlong=data.overlong,
            store=self.store,
            columns={str(name): column for name, column in data.columns.items()},
            block_chars=BLOCK_CHARS,
        )
        self.how, self._is_read = {**how, **({"of": name} if data.drop_consumed else {})}, False
        self.units = split_units(found, UNIT_BYTES)

    @property
    def folder(self) -> Folder:
        """Where the data set is, or will be."""
        return self.dataset.folder

    def run(
        self,
        run: Runner = run_here,
        progress: Progress = no_progress,
        stop: Callable[[], bool] = bool,
        *,
        is_read: bool = False,
    ) -> Folder:
        """Prepare what is missing; windows of shards can be read as soon as they are made.

        Args:
            run: does the work on units.
            progress: called with the source bytes done and their total.
            stop: asked after every unit.
            is_read: a run reads the data set meanwhile; with `data.drop_consumed` it is not left far behind.

        Raises:
            DataError: as `prepare_local`.
            Stopped: if `stop` said so.
        """
        self._is_read = is_read
        if not self.dataset.is_whole():
            with self.dataset.preparing(), contextlib.closing(Records()) as records:
                self.dataset.commit(self._run_units(run, progress, stop, records), records)
        self.dataset.check_counts(self.patterns, self.data.max_quarantine)
        mark_used(self.folder)
        return self.folder

    def decided(
        self, run: Runner = run_here, progress: Progress = no_progress
    ) -> list[tuple[Unit, tuple[Mask, ...]]]:
        """All units with what the barriers decided about their rows."""
        found: list[tuple[Unit, tuple[Mask, ...]]] = [(unit, ()) for unit in self.units]
        places = [i for i, transform in enumerate(self.plan.transforms) if isinstance(transform, Barrier)]
        for number, place in enumerate(places):
            masks = [mask for _, mask in found]
            outcomes = []
            for outcome in self._pass(run, place, self.units, masks):
                outcome.quarantined = []  # they are told by a preparation
                outcomes.append(outcome)
            outcomes.sort(key=lambda outcome: outcome.unit.index)
            decided = self.plan.transforms[place].keep([outcome.keys or [] for outcome in outcomes])  # type: ignore[union-attr]
            found = [(unit, (*mask, new)) for (unit, mask), new in zip(found, decided, strict=True)]
            progress(number + 1, len(places))
        return found

    def _run_units(
        self, run: Runner, progress: Progress, stop: Callable[[], bool], records: Records
    ) -> list[Outcome]:
        """Outcomes of all units in their order; one pass for each barrier, then the final one.

        A stream makes these passes over a window of units at a time.
        """
        places = [i for i, transform in enumerate(self.plan.transforms) if isinstance(transform, Barrier)]
        deciders = {place: self._decider(self.plan.transforms[place]) for place in places}
        size = self.data.window_shards if self.data.stream and places else max(1, len(self.units))
        size_bytes = sum(unit.stop - unit.start for unit in self.units)
        total = size_bytes * (len(places) + 1)
        done, outcomes, prefix = 0, list[Outcome](), Prefix(self.dataset)
        limits = {place: QuarantineLimit(self.data.max_quarantine, size_bytes) for place in [*places, None]}
        progress(0, total)
        for start in range(0, len(self.units), size):
            units = self.units[start : start + size]
            masks: list[tuple[Mask, ...]] = [() for _ in units]
            for place in [*places, None]:
                found: list[Outcome] = []
                # A cluster is told at once that nobody waits for the rest.
                with contextlib.closing(self._pass(run, place, units, masks)) as work:
                    for outcome in work:
                        found.append(records.take(outcome))
                        if limits[place].passed(outcome):
                            self._refuse(limits[place], [*outcomes, *found], records)
                        if place is None:
                            prefix.add(outcome)
                            self._wait_for_reader(prefix, stop)
                        done += outcome.unit.stop - outcome.unit.start
                        progress(done, total)
                        if stop():
                            raise Stopped
                found.sort(key=lambda outcome: outcome.unit.index)
                if place is not None:
                    decided = deciders[place]([outcome.keys or [] for outcome in found])
                    masks = [(*known, new) for known, new in zip(masks, decided, strict=True)]
            outcomes += found
        return outcomes

    def _refuse(self, limit: QuarantineLimit, outcomes: list[Outcome], records: Records) -> NoReturn:
        """End with what has been found in the units that were judged."""
        judged = [outcome for outcome in outcomes if outcome.unit.index < limit.units]
        self.dataset.write_quarantine(sorted(judged, key=lambda outcome: outcome.unit.index), records)
        quarantined = dict(limit.quarantined.most_common())
        raise self.dataset.too_many(self.patterns, self.data.max_quarantine, limit.rows, quarantined)

    def _decider(self, barrier: Any) -> Decider:
        decider: Decider = barrier.running() if self.data.stream else barrier.keep
        return decider

    def _wait_for_reader(self, prefix: Prefix, stop: Callable[[], bool]) -> None:
        """Stay a few windows ahead of a run that drops them, so that the disk it takes is bounded."""
        if self._is_read and self.data.stream and self.data.drop_consumed:
            while prefix.windows_ahead() > _WINDOWS_AHEAD and not stop():
                time.sleep(_POLL_S)

    def _pass(
        self, run: Runner, place: int | None, units: Sequence[Unit], masks: Sequence[tuple[Mask, ...]]
    ) -> Generator[Outcome]:
        """Outcomes of units up to a barrier, or to the end: first what is remembered, then the rest."""
        tasks = []
        asked = [
            Task(unit, mask, place is None, self._key(unit, mask, place))
            for unit, mask in zip(units, masks, strict=True)
        ]
        for task, found in zip(asked, each_of(self.store, self._remembered, asked), strict=True):
            if found is None:
                tasks.append(task)
            else:
                yield found
        # Tasks of a cluster write shards before anyone takes their outcomes, so a run that is to wait gets few.
        size = self.data.window_shards if self.data.drop_consumed else max(1, len(tasks))
        for start in range(0, len(tasks), size):
            for outcome in run(functools.partial(prepare_unit, self.plan), tasks[start : start + size]):
                if outcome.shards and self.store.stamp(shard_name(outcome.shards[-1])) is None:
                    raise DataError(
                        f"{self.folder}: a shard written by another node is not here; "
                        "set data.cache_dir to storage that all nodes share"
                    )
                yield outcome

    def _remembered(self, task: Task) -> Outcome | None:
        return load_outcome(self.store, task.key, task.unit, final=task.final)

    def _key(self, unit: Unit, masks: Sequence[Mask], place: int | None) -> str:
        return unit_key(self.how, self.sources[unit.file]["digest"], unit, masks, place)


def _absolute(tokenizer_folder: str) -> str:
    """Workers on other nodes start elsewhere, so what is a path is made absolute; a Hub id stays as it is."""
    from pathlib import Path

    local = Path(tokenizer_folder).expanduser()
    return str(local.absolute()) if local.is_dir() else str(tokenizer_folder)


def _how(data: DataConfig, tok: Tokeniser) -> dict[str, Any]:
    """Everything besides the sources that the shards and the quarantine depend on."""
    return {
        "format_version": FORMAT_VERSION,
        "unit_bytes": UNIT_BYTES,
        "block_chars": BLOCK_CHARS,
        "columns": dict(data.columns),
        "transforms": dump(data.prepare_transforms),
        "max_length": data.max_length,
        "packing": data.packing,
        "overlong": data.overlong,
        "tokenizer": tok.digest,
        "chat_template_hash": tok.template_digest,
    }
