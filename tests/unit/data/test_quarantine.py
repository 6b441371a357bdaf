"""Too many bad rows: told early, alike whoever prepares them, and never held in memory."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data import prepare as prepare_module
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.quarantine import QuarantineLimit
from ftray.data.read import Shards
from ftray.data.work import run_here

Make = Callable[..., DataConfig]
WriteRows = Callable[..., Path]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]


def test_too_many_bad_rows_are_told_early(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after a whole corpus whose rows lack a field; and not because the first rows of many are bad."""
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 4000)
    row = {"text": "x" * 80}
    worked: list[int] = []

    def run(work: Any, tasks: Any) -> Any:
        for task in tasks:
            worked.append(task.unit.index)
            yield work(task)

    data = config(write_rows([{"test": "x" * 80}] * 8000), max_quarantine=0.05)
    preparation = Preparation(data, tokenizer_folder)
    with pytest.raises(
        DataError, match=r"rows cannot be used, more than max_quarantine 0\.05 allows: "
    ) as caught:
        preparation.run(run)
    assert 20 < len(worked) < len(preparation.units) / 4
    quarantine = Path(str(caught.value).rpartition("see ")[2])
    assert len(quarantine.read_text().splitlines()) > 1000
    fine = config(write_rows([{"test": "x"}] * 200 + [row] * 6000), max_quarantine=0.05)
    assert Shards(prepare_local(fine, tokenizer_folder)).manifest["counts"]["documents"] == 6000


@pytest.mark.parametrize("transforms", [[], ["dedup"]])
def test_the_verdict_depends_on_no_order_of_the_work(
    write_rows: WriteRows,
    config: Make,
    tokenizer_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    transforms: list[str],
) -> None:
    """The first 5,000 rows are judged by themselves; a second attempt says the same."""
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 20_000)
    rows = [{"text": f"{i} of many"} for i in range(8000)]
    rows[100:400] = [{"test": 1}] * 300
    data = config(write_rows(rows), max_quarantine=0.05, transforms=transforms)
    told = []

    def shuffled(work: Any, tasks: Any) -> Any:
        return map(work, random.Random(len(told)).sample(list(tasks), len(tasks)))

    for run in (run_here, shuffled, shuffled):
        with pytest.raises(DataError, match=r"300 of 5\d\d\d rows cannot be used") as caught:
            Preparation(data, tokenizer_folder).run(run)
        quarantine = Path(str(caught.value).rpartition("see ")[2])
        told.append((str(caught.value), quarantine.read_text()))
        assert [json.loads(line)["line"] for line in told[-1][1].splitlines()] == list(range(101, 401))
    assert told[0] == told[1] == told[2]


def test_records_of_bad_rows_are_not_held(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 4000)
    held: list[int] = []
    real = QuarantineLimit.passed

    def passed(limit: QuarantineLimit, outcome: Any) -> bool:
        held.append(len(outcome.quarantined))
        return real(limit, outcome)

    monkeypatch.setattr(QuarantineLimit, "passed", passed)
    data = config(write_rows([{"text": "a"}, {"test": "b"}] * 1000), max_quarantine=0.6)
    folder = prepare_local(data, tokenizer_folder)
    assert len(held) > 5 and set(held) == {0}
    assert [record["line"] for record in records(folder)] == list(range(2, 2001, 2))
