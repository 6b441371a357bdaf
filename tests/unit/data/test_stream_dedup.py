"""Exact duplicates are found while rows stream as they are when all are prepared before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import DataConfig
from ftray.data import prepare
from ftray.data.prepare import Preparation
from ftray.data.read import read_manifest
from ftray.data.units import prepare_unit

WriteRows = Callable[..., Path]


def test_a_stream_drops_the_same_rows(
    write_rows: WriteRows, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 300)
    rows = write_rows([{"text": f"Row  {i % 211}"} for i in range(400)])
    done: list[tuple[int, bool]] = []

    def work(plan: Any, task: Any) -> Any:
        done.append((task.unit.index, task.final))
        return prepare_unit(plan, task)

    monkeypatch.setattr(prepare, "prepare_unit", work)
    found = {}
    for stream in (False, True):
        done.clear()
        data = DataConfig(
            train=[str(rows)],
            cache_dir=str(tmp_path / f"cache-{stream}"),
            max_length=64,
            stream=stream,
            window_shards=3,
            transforms=["clean", "dedup", {"type": "dedup", "ignore_case": False}],  # type: ignore[list-item]
        )
        folder = Preparation(data, tokenizer_folder).run()
        manifest = read_manifest(folder)
        found[stream] = [manifest["counts"], [shard["digest"] for shard in manifest["shards"]]]
        if stream:
            finals = [place for place, (_, final) in enumerate(done) if final]
            assert done[finals[0]][0] == 0 and finals[0] == 6, (
                "a window's passes come before the next window's"
            )
            assert sum(1 for _ in Path(folder).glob("window-3-*.json")) > 2
    assert found[True] == found[False]
    assert found[True][0]["documents"] == 400 - found[True][0]["filtered"]["dedup.duplicate"] == 211
