"""Write packed rows as an Arrow file; its bytes depend on the rows alone, so equal work has equal digests."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.core.fs import digest_file
from ftray.data.pack import Packed
from ftray.data.read import IGNORE_INDEX

SHARD_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("doc_lens", pa.list_(pa.int32())),
        ("group_lens", pa.list_(pa.int32())),
        ("row_id", pa.int64()),
    ]
)
"""`row_id` is the row's number in its shard; a shard's first row is the sum of the rows before it."""


def write_shard(packed: Packed, path: Path) -> dict[str, Any]:
    """Write one shard; returns its manifest entry (file, rows, tokens, targets, digest)."""
    documents, rows = packed.documents, len(packed.docs_per_row)
    tokens = _offsets(packed.tokens_per_row)
    columns = [
        pa.ListArray.from_arrays(tokens, pa.array(documents.input_ids)),
        pa.ListArray.from_arrays(tokens, pa.array(documents.labels)),
        pa.ListArray.from_arrays(tokens, pa.array(documents.weights)),
        pa.ListArray.from_arrays(_offsets(packed.docs_per_row), pa.array(documents.lens.astype(np.int32))),
        pa.ListArray.from_arrays(
            _offsets(packed.groups_per_row), pa.array(packed.group_lens.astype(np.int32))
        ),
        pa.array(np.arange(rows)),
    ]
    batch = pa.record_batch(columns, schema=SHARD_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_batch(batch)
    return {
        "file": path.name,
        "rows": rows,
        "tokens": len(documents.input_ids),
        "targets": int((documents.labels != IGNORE_INDEX).sum()),
        "digest": digest_file(path),
    }


def _offsets(counts: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
