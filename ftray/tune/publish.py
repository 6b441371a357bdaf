"""Publishing the best delta of a search with where it comes from."""

from pathlib import Path
from typing import Any

from ftray.core.errors import TuneError
from ftray.core.fs import read_json
from ftray.eval.publish import publish as publish_delta
from ftray.registry.entry import Entry
from ftray.registry.registry import Registry
from ftray.tune.result import TuneResult
from ftray.tune.segment import RESULT


def publish(result: TuneResult, name: str, registry: Path | str, *, parity: bool = True) -> Entry:
    """Publish the winner, measured on its base (`ftray.eval.publish`) unless `parity` is False.

    Its lineage names the search, the digests of the deltas its weights have been, oldest first, and the segments
    they were trained in with their configurations and scores.

    Raises:
        TuneError: if the winner has no delta.
        DeltaError: if it does not answer alike alone, merged and served.
        RegistryError: if the name is refused.
    """
    if result.delta is None:
        raise TuneError(
            f"--publish: the winner has no delta; train_fn returned none, so {name!r} is not made"
        )
    lineage: dict[str, Any] = {
        "run": str(result.delta.parent),
        "parents": _ancestors(result),
        "segments": result.schedule,
    }
    return publish_delta(Registry(registry), result.delta, name, lineage=lineage, parity=parity)


def _ancestors(result: TuneResult) -> list[str]:
    """Digests of the deltas before the last, as far as the segments left word of them."""
    found = []
    for step in result.schedule[:-1]:
        path = result.journal.parent / "segments" / step["checkpoint"] / RESULT
        digest = read_json(path).get("delta_digest") if path.is_file() else None
        if digest:
            found.append(digest)
    return found
