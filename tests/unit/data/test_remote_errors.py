"""What clients of remote stores raise, of whatever kind, ends in one line that names the place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ftray.core.errors import DataError
from ftray.data.fingerprint import fingerprints
from ftray.data.prepare import prepare_local
from ftray.data.source import Records, find_sources, split_units
from ftray.data.store import Store, open_store


class ClientError(Exception):
    """As botocore's and aiohttp's: no `OSError`."""


class FlakyFile(MemoryFile):
    def read(self, *sizes: Any) -> bytes:
        raise ClientError("An error occurred (SlowDown)\nwhen calling the GetObject operation")

    readline = read


class FlakyFileSystem(MemoryFileSystem):
    """A store that answers some calls and fails in others."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failing: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("flaky://"))

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "failing"):
            raise ClientError(f"An error occurred (503) when calling {name}\nReduce your request rate")
        return super().__getattribute__(name)

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if mode == "rb" and "read" in type(self).failing:
            return FlakyFile(self, path, self.store[path].getvalue())
        return super()._open(path, mode, **settings)


@pytest.fixture
def flaky() -> Iterator[set[str]]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    fsspec.filesystem("flaky").pipe_file("/in/rows.jsonl", b'{"text": "a"}\n' * 10)
    yield FlakyFileSystem.failing
    FlakyFileSystem.failing.clear()
    FlakyFileSystem.store.clear()


def test_a_source_that_fails_while_it_is_read(flaky: set[str]) -> None:
    [unit] = split_units(find_sources(["flaky://in/rows.jsonl"]))
    assert len(list(Records(unit))) == 10
    flaky.add("read")
    with pytest.raises(
        DataError, match=r"flaky:///?in/rows.jsonl: cannot be read \(An error .* operation\)"
    ) as caught:
        list(Records(unit))
    assert "\n" not in str(caught.value)


def test_a_source_that_cannot_be_asked_about(flaky: set[str], tmp_path: Path) -> None:
    flaky.add("info")
    with pytest.raises(DataError, match=r"cannot be read \(.*503.*\); check the URL"):
        fingerprints(["flaky://in/rows.jsonl"], open_store(tmp_path))


def _write_file(store: Store) -> None:
    with store.writing("c") as path:
        path.write_text("x")


CALLS: dict[str, Callable[[Store, Path], Any]] = {
    "cat_file": lambda store, _: store.read_json("a.json"),
    "put_file": lambda store, _: _write_file(store),
    "info": lambda store, _: store.stamp("a.json"),
    "get_file": lambda store, folder: store.fetch("a.json", folder / "y"),
    "rm_file": lambda store, _: store.remove("a.json"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_fails(flaky: set[str], tmp_path: Path, call: str) -> None:
    store = open_store("flaky://out")
    store.write_json("a.json", {})
    flaky.add(call)
    with pytest.raises(
        DataError, match=r"flaky://out/(a.json|c): cannot be .*503.*; check the URL"
    ) as caught:
        CALLS[call](store, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_told_as_such(flaky: set[str], tmp_path: Path) -> None:
    store = open_store("flaky://out")
    assert store.read_json("none.json") is None and store.stamp("none") is None
    with pytest.raises(DataError, match=r"is not there any more.; prepare the data again"):
        store.fetch("none", tmp_path / "y")


def test_a_whole_preparation_from_and_to_it(flaky: set[str], config: Any, tokenizer_folder: str) -> None:
    data = config("flaky://in/rows.jsonl", cache_dir="flaky://cache")
    prepare_local(data, tokenizer_folder)
