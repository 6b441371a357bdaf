"""The prepared units of all data sets of a cache, each under a key of all that decides its content.

    shards/<source>/<unit>.<number>.arrow   packed rows of a block
    shards/<source>/<unit>.json             what became of the unit's rows; written last
    shards/<source>/<unit>.keys             what a barrier compares

`<source>` is a digest of a source file and of what is done to it, so a new file costs only itself, a file that
two data sets share is prepared once, and a killed preparation goes on with the units that are missing. What a
barrier decided about a unit's rows enters the unit's key: where the decision is the old one, so is the unit.
"""

import dataclasses
import itertools
import json
import posixpath
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ftray.core.errors import DataError
from ftray.core.fs import digest_bytes, digest_file, digest_json
from ftray.data.pack import Packed
from ftray.data.shards import write_shard
from ftray.data.source import Unit
from ftray.data.store import LocalStore, Stamp, Store
from ftray.data.transform.base import Mask
from ftray.data.work import Outcome, Plan, Task, work_on

_AFTER_ROWS = ("tokenizer", "chat_template_hash", "max_length", "packing", "overlong")
"""What comes after the transforms, and so does not decide a barrier's keys."""


_READ = ("lines", "rows")
"""What is remembered of a unit with what a barrier compares, besides the rows that cannot be used."""
_REMEMBERED = (
    "lines",
    "rows",
    "documents",
    "pairs",
    "split",
    "truncated",
    "filtered",
    "changed",
    "shards",
)


def prepare_unit(plan: Plan, task: Task) -> Outcome:
    """Work on a unit and keep the result under its key. Raises `DataError` as `work_on`."""
    numbers = itertools.count()
    outcome = work_on(plan, task, lambda packed: save_shard(plan.store, task.key, next(numbers), packed))
    save_outcome(plan.store, task.key, outcome)
    return outcome


def unit_key(
    plan: Mapping[str, Any], source_digest: str, unit: Unit, masks: Sequence[Mask], barrier: int | None
) -> str:
    """The name (without suffix) of a unit's files.

    Args:
        plan: everything that is done to a row, as JSON.
        source_digest: digest of the source file.
        unit: the part of it.
        masks: decisions of the barriers so far.
        barrier: place among the transforms of the barrier that asks for keys; None for the shard itself.
    """
    plan = dict(plan)
    if barrier is not None:
        plan = {key: value for key, value in plan.items() if key not in _AFTER_ROWS}
        plan["transforms"] = plan["transforms"][: barrier + 1]
    part = {key: value for key, value in dataclasses.asdict(unit).items() if key not in ("index", "file")}
    decided = [digest_bytes(np.packbits(mask).tobytes()) + f"/{len(mask)}" for mask in masks]
    source, name = digest_json([source_digest, plan]), digest_json([part, decided])
    return f"shards/{_short(source)}/{_short(name)}"


def save_shard(store: Store, key: str, number: int, packed: Packed) -> dict[str, Any]:
    """Write one of a unit's shards; returns its manifest entry."""
    name = f"{key}.{number}.arrow"
    with store.writing(name) as path:
        entry = write_shard(packed, path)
        entry["size_bytes"] = path.stat().st_size
    return {**entry, "file": f"../{name}"}


def shard_name(shard: Mapping[str, Any]) -> str:
    """The name in the store of a shard's file, from its manifest entry."""
    return posixpath.normpath(f"set/{shard['file']}")


def save_outcome(store: Store, key: str, outcome: Outcome) -> None:
    """Remember what became of a unit's rows, or the keys a barrier asks for."""
    if outcome.keys is not None:
        if all(isinstance(key, bytes) for key in outcome.keys):
            about = {"about": json.dumps(_record(outcome, _READ))}
            table = pa.table({"key": pa.array(outcome.keys, pa.binary())}).replace_schema_metadata(about)
            with store.writing(f"{key}.keys") as path, pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        return
    record = _record(outcome, _REMEMBERED)
    store.write_json(f"{key}.json", {**record, "stamps": _stamps(store, outcome.shards)})


def _record(outcome: Outcome, names: Sequence[str]) -> dict[str, Any]:
    record = {name: getattr(outcome, name) for name in names}
    # Where the file lies is not part of what the rows are.
    record["quarantined"] = [
        {name: value for name, value in row.items() if name != "file"} for row in outcome.quarantined
    ]
    return record


def _outcome(unit: Unit, record: Mapping[str, Any], **more: Any) -> Outcome:
    quarantined = [{"file": unit.file, **row} for row in record["quarantined"]]
    bad = Counter(row["reason"] for row in quarantined)
    counters: dict[str, Any] = {n: Counter(record[n]) for n in ("filtered", "changed") if n in record}
    return Outcome(unit, **{**record, **counters, "quarantined": quarantined, "bad": bad, **more})


def load_outcome(store: Store, key: str, unit: Unit, *, final: bool) -> Outcome | None:
    """What is remembered of a unit, or None if it is to be prepared.

    A shard that changed since it was written is compared with its digest, named in a warning and forgotten.
    """
    if not final:
        return _load_keys(store, key, unit)
    record = store.read_json(f"{key}.json")
    if not isinstance(record, dict):
        return None
    known, shards = record.pop("stamps"), record["shards"]
    now = _stamps(store, shards)
    for shard, before, stamp in zip(shards, known, now, strict=True):
        name = shard_name(shard)
        if stamp != before and not _is_whole(store, name, shard["digest"]):
            warnings.warn(
                f"{store.folder(name)}: missing or not what was written; preparing it again", stacklevel=2
            )
            store.remove(f"{key}.json")
            return None
    if now != known:
        store.write_json(f"{key}.json", {**record, "stamps": now})
    return _outcome(unit, record)


def _load_keys(store: Store, key: str, unit: Unit) -> Outcome | None:
    if store.stamp(f"{key}.keys") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ftray-get-") as folder:
        path = Path(folder) / "keys"
        try:
            store.fetch(f"{key}.keys", path)
            table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
            about = json.loads((table.schema.metadata or {})[b"about"])
        except (pa.ArrowInvalid, DataError, OSError, KeyError, ValueError):
            return None
    return _outcome(unit, about, keys=table["key"].to_pylist())


def _stamps(store: Store, shards: Sequence[Mapping[str, Any]]) -> list[Stamp | None]:
    return [store.stamp(shard_name(shard)) for shard in shards]  # of one unit, so few


def _is_whole(store: Store, name: str, digest: str) -> bool:
    if not isinstance(store, LocalStore):
        return False
    try:
        return digest_file(store.folder(name)) == digest
    except OSError:
        return False


def _short(digest: str) -> str:
    return digest.removeprefix("xxh3:")[:20]
