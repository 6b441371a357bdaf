"""Which engine replica a request prefers: the one that has its delta in place, unless that one is much busier.

Rendezvous hashing (Thaler and Ravishankar, 1998): every front finds the same home for a delta with nothing shared,
and a replica that comes or goes moves only the deltas it gains or had.
"""

from collections.abc import Mapping

import xxhash

SLACK = 8
"""Requests by which the home may be ahead of the least busy replica before that one is preferred."""


def preferred(delta: str | None, queues: Mapping[str, int | None], attempt: int = 0) -> list[list[str]]:
    """Replicas by rank, the first to be tried first; those of one rank are tried by their load.

    Args:
        delta: digest of the delta; None: the base, which every replica has.
        queues: requests at each replica, None where that is not known.
        attempt: how often the request has been tried in vain; each time another replica comes first.
    """
    if not queues:
        return []
    if delta is None:
        return [list(queues)]
    ranked = sorted(queues, key=lambda name: xxhash.xxh3_64_intdigest(f"{delta}|{name}".encode()))
    home = ranked[attempt % len(ranked)]
    known = [queue for queue in queues.values() if queue is not None]
    if not attempt and known and (queues[home] or 0) > min(known) + SLACK:
        return [list(queues)]
    others = [name for name in queues if name != home]
    return [[home], others] if others else [[home]]
