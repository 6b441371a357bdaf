"""A unit that cannot be made small goes through in blocks: the rows of a whole, in the memory of a small one."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.fs import digest_tree
from ftray.data import prepare, units
from ftray.data.dataset import Prefix
from ftray.data.grow import Background, GrowingShards
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.read import Shards

Make = Callable[..., DataConfig]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]
STEPS = ["clean", {"type": "length", "min_chars": 12}, "dedup", {"type": "length", "max_chars": 90}]


def lines_of(count: int) -> list[bytes]:
    """Rows short, long and repeated, blank lines and broken ones among them."""
    found = []
    for number in range(count):
        which = number % (count * 3 // 4)
        text = f"{which} " + " ".join(random.Random(which).choices(WORDS, k=which % 23))
        found.append(json.dumps({"text": text}).encode())
        if number % 50 == 17:
            found.append(b"")
        if number % 40 == 31:
            found.append(b'{"text": 7}' if number % 80 == 31 else b"{")
    return found


def write(path: Path, lines: list[bytes]) -> Path:
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents(shards: Shards) -> Iterator[tuple[int, ...]]:
    for index in range(len(shards)):
        row, start = shards.row(index), 0
        for size in row.doc_lens.tolist():
            yield tuple(row.input_ids[start : start + size].tolist())
            start += size


def quarantined(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]


def test_blocks_hold_the_rows_of_the_whole(
    tmp_path: Path, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With barriers decided block by block, and the place of every bad row."""
    lines = lines_of(2000)
    data = config(
        write(tmp_path / "rows.jsonl.gz", lines), transforms=STEPS, max_quarantine=0.1, max_length=256
    )
    whole = Shards(prepare_local(data, tokenizer_folder))
    monkeypatch.setattr(prepare, "BLOCK_CHARS", 9_000)
    preparation = Preparation(data, tokenizer_folder)
    cut = Shards(preparation.run())
    assert len(preparation.units) == len(whole.shards) == 1 and len(cut.shards) > 8
    assert sorted(documents(cut)) == sorted(documents(whole))
    packing = {"packed_rows", "padding_fraction"}
    same = [
        {name: value for name, value in shards.manifest["counts"].items() if name not in packing}
        for shards in (whole, cut)
    ]
    assert same[0] == same[1] and len(same[0]["filtered"]) == 3
    bad = quarantined(cut.path)
    assert bad == quarantined(whole.path) and len(bad) == 50
    content = b"\n".join(lines)
    for row in bad:
        assert content[row["offset"] :].split(b"\n", 1)[0] == lines[row["line"] - 1]
        assert lines[row["line"] - 1] in (b'{"text": 7}', b"{")


def test_a_lost_block_is_made_again(
    tmp_path: Path, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK_CHARS", 9_000)
    data = config(write(tmp_path / "rows.jsonl.gz", lines_of(1000)), transforms=["clean"], max_quarantine=0.1)
    skip = frozenset({"stamps.json", "used.json"})
    before = digest_tree(prepare_local(data, tokenizer_folder), skip=skip)
    shards = sorted(tmp_path.glob("cache/shards/*/*.arrow"))
    worked: list[str] = []
    real = units.prepare_unit
    monkeypatch.setattr(prepare, "prepare_unit", lambda *task: worked.append("") or real(*task))
    shards[2].unlink()
    with pytest.warns(UserWarning, match=f"{shards[2]}: missing or not what was written"):
        folder = prepare_local(data, tokenizer_folder)
    assert len(worked) == 1 and digest_tree(folder, skip=skip) == before
    assert sorted(tmp_path.glob("cache/shards/*/*.arrow")) == shards


def test_windows_end_within_a_unit(
    tmp_path: Path, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK_CHARS", 3_000)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl.gz", lines_of(400))
    data = config(f"{tmp_path}/*.gz", window_shards=3, stream=True, max_quarantine=0.1)
    starts: list[int] = []
    real = Prefix.add

    def add(prefix: Prefix, outcome: Any) -> None:
        real(prefix, outcome)
        starts[:] = prefix._starts

    monkeypatch.setattr(Prefix, "add", add)
    background = Background(Preparation(data, tokenizer_folder))
    growing = GrowingShards(background.folder, 3)
    growing.ensure(10**9)
    background.close()
    whole = Shards(background.folder)
    assert whole.shards == growing.shards and len(whole.shards) > 10
    assert len(list(Path(background.folder).glob("window-3-*.json"))) == len(whole.shards) // 3
    rows = [shard["rows"] for shard in whole.shards]
    assert starts == [sum(rows[: 3 * n]) for n in range(len(rows) // 3 + 1)]


MEASURE = """
import gc, sys
from pathlib import Path
from ftray.config.recipe import DataConfig
from ftray.data import prepare

prepare.BLOCK_CHARS, folder, tokenizer = 1 << 19, Path(sys.argv[1]), sys.argv[2]

def peak_mb(name):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    prepare.prepare_local(DataConfig(train=[str(folder / name)], cache_dir=str(folder / "cache")), tokenizer)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

peak_mb("tiny.jsonl.gz")
base = peak_mb("tiny.jsonl.gz")
print(*(peak_mb(name) - base for name in sys.argv[3:]))
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer_folder: str) -> None:
    """A compressed file, or a row group, of ten blocks takes little more than one of a single block."""
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=240)) for _ in range(5000)]

    def lines(count: int) -> list[bytes]:
        return [json.dumps({"text": text}).encode() for text in texts[:count]]

    write(tmp_path / "tiny.jsonl.gz", lines(5))
    write(tmp_path / "small.jsonl.gz", lines(500))
    write(tmp_path / "large.jsonl.gz", lines(5000))
    pq.write_table(pa.table({"text": texts}), tmp_path / "large.parquet", row_group_size=1 << 20)
    assert pq.ParquetFile(tmp_path / "large.parquet").metadata.num_row_groups == 1
    names = ["small.jsonl.gz", "large.jsonl.gz", "large.parquet"]
    command = [sys.executable, "-c", MEASURE, str(tmp_path), tokenizer_folder, *names]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    ).stdout
    small, *large = map(float, found.split())
    assert small > 10, "one block is seen"
    assert max(large) < 3 * small, f"{small:.0f} MiB for one block, {large} for ten"
