"""Names of KV blocks by what their keys and values depend on, so that equal prefixes are computed once.

A block's name is a hash over everything before it (Zheng et al., arXiv:2312.07104): who asks, which weights answer,
how they compute, and every token up to its end. Two tenants, or two deltas, never name a block alike.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence

_SIZE = 16


def chain_seed(fields: Iterable[str]) -> bytes:
    """The name that stands before the first block. Fields carry their length: `ab, c` is not `a, bc`."""
    hasher = hashlib.blake2b(digest_size=_SIZE)
    for field in fields:
        data = field.encode("utf-8", "surrogatepass")
        hasher.update(struct.pack("<q", len(data)) + data)
    return hasher.digest()


def chain_next(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the block that holds `tokens` after the block named `before`."""
    return hashlib.blake2b(before + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=_SIZE).digest()
