"""What one engine holds, when the folders under it go away and disks and networks fail for a while."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ftray.core.errors import DeltaError, RegistryError
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.fake import FakeDelta, FakeEngineConfig
from ftray.registry.registry import Registry
from ftray.serve import hold
from ftray.serve.backend import ServedModel
from ftray.serve.control import Orders
from ftray.serve.follow import EngineFollower
from ftray.serve.hold import Holder
from ftray.serve.loop import EngineLoop
from ftray.serve.models import Follower
from ftray.serve.prompts import Prompts
from ftray.serve.rollout import Report, Rollout

A, B = (ServedModel(id=name, ref=f"{name}@1", digest=f"xxh3:{name}") for name in "ab")


class Copies:
    """Brings deltas into folders of this machine, unless it is told to fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problem: Exception | None = None
        self.brought: list[str] = []

    def bring(self, model: ServedModel) -> str:
        self.brought.append(model.name)
        if self.problem and model is A:
            raise self.problem
        folder = self.root / model.name
        folder.mkdir(exist_ok=True)
        return str(folder)


@contextlib.asynccontextmanager
async def holding(copies: Copies) -> AsyncIterator[tuple[Holder, Any]]:
    """A holder, and its engine, which keeps nothing in memory that no request is under."""
    engine: Any = FakeEngineConfig(text="I am {model}.").build("tiny")

    def read(folder: str) -> FakeDelta:
        next(Path(folder).parent.glob(Path(folder).name))  # it is there
        return FakeDelta(Path(folder).name)

    engine._runner.read = read
    loop = EngineLoop(engine, 8).start()
    try:
        yield Holder(loop, Prompts(engine.tokenizer), copies.bring), engine
    finally:
        await asyncio.to_thread(loop.stop)


async def ask(holder: Holder, model: ServedModel) -> list[Output]:
    request = Request(id="r", prompt_ids=[65], delta=model.digest, sampling=Sampling(max_tokens=20))
    return [output async for output in holder._loop.generate(request)]


def forget(engine: Any, model: ServedModel) -> None:
    """Its tensors leave the memory, as they do where there are more deltas than places."""
    entry = engine._slots.find(model.digest)
    engine._slots._displace(entry)
    engine._slots._kept.pop(entry, None)
    entry.host = None


def test_a_copy_that_has_gone_is_brought_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        copies = Copies(tmp_path)
        async with holding(copies) as (holder, _):
            await holder.follow([A])
            assert holder.loaded == {A.digest} and copies.brought == ["a"]
            await holder._loop.call(lambda engine: forget(engine, A))
            shutil.rmtree(tmp_path / "a")
            assert "".join(output.text for output in await ask(holder, A)) == "I am a."
            await holder._loop.call(lambda engine: forget(engine, A))
            copies.problem = RegistryError(f"{tmp_path}/a: is damaged")
            (last,) = await ask(holder, A)
            assert (last.finish_reason, last.status) == ("error", 503)
            assert str(tmp_path) not in (last.error or "")
            copies.problem = None
            assert (await ask(holder, A))[-1].finish_reason == "stop"

    asyncio.run(scenario())


def damaged_by(cause: Exception) -> RegistryError:
    """As the registry says it."""
    try:
        raise cause
    except Exception:
        try:
            raise RegistryError("a@1 is damaged") from None
        except RegistryError as error:
            return error


@pytest.mark.parametrize(
    ("problem", "passing"),
    [
        (OSError(5, "I/O error"), True),
        (damaged_by(ConnectionError("network")), True),
        (KeyError("planted"), True),
        (RegistryError("a@1: another digest"), False),
        (damaged_by(DeltaError("another digest")), False),
    ],
)
def test_what_fails_keeps_no_other_out_and_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, passing: bool
) -> None:
    monkeypatch.setattr(hold, "_RETRY_S", 0.2)

    async def scenario() -> None:
        copies = Copies(tmp_path)
        async with holding(copies) as (holder, _):
            copies.problem = problem
            await holder.follow([A, B])
            assert holder.loaded == {B.digest}
            assert (A.digest in holder.delayed, A.digest in holder.failed) == (passing, not passing)
            copies.problem = None
            await holder.follow([A, B])
            assert holder.loaded == {B.digest}  # not at once
            await asyncio.sleep(0.25)
            await holder.follow([A, B])
            assert holder.loaded == {A.digest, B.digest}
            assert holder.failed == holder.delayed == {}

    asyncio.run(scenario())


def test_a_step_that_fails_does_not_reject_the_version_that_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "_RETRY_S", 0.0)

    async def scenario() -> None:
        async with holding(Copies(tmp_path)) as (holder, engine):
            forward = engine._runner.forward
            engine._runner.forward = None
            await holder.follow([A])
            assert (holder.loaded, holder.failed, list(holder.delayed)) == (frozenset(), {}, [A.digest])
            engine._runner.forward = forward
            await holder.follow([A])
            assert holder.loaded == {A.digest}

    asyncio.run(scenario())


def test_a_check_that_failed_for_a_while_is_made_again(tmp_path: Path) -> None:
    class Entry:
        ref, digest, path = "a@1", "xxh3:a", tmp_path

    class OneEntry(Registry):
        problem: Exception | None = damaged_by(OSError("network"))

        def show(self, ref: str) -> Any:
            return Entry()

        def resolve(self, ref: str) -> Any:
            if self.problem:
                raise self.problem
            return Entry()

        def stamps(self, names: Any) -> Any:
            return dict.fromkeys(names, (1, 1))

    registry = OneEntry(tmp_path)
    follower = Follower(registry, lambda folder: None)
    with pytest.raises(RegistryError):
        follower.models("a@1")
    registry.problem = None
    assert [model.ref for model in follower.models("a@1")] == ["a@1"]


def test_an_engine_is_heard_of_while_it_loads(tmp_path: Path) -> None:
    """What it brings takes three times as long as the control waits for a report."""
    rollout = Rollout(ServedModel(id="base", ref="tiny", digest="base", is_base=True), member_s=0.2)

    class Link:
        async def sync(self, report: Report) -> Orders:
            rollout.hear(report)
            return Orders(hold=[A], view=None)

    async def scenario() -> None:
        copies = Copies(tmp_path)
        bring = copies.bring
        copies.bring = lambda model: (time.sleep(0.6), bring(model))[1]  # type: ignore[method-assign]
        async with holding(copies) as (holder, _):
            link: Any = Link()
            follower = EngineFollower(holder._loop, holder, link, every_s=0.05)
            loading = asyncio.create_task(follower.follow())
            while not loading.done():
                await asyncio.sleep(0.05)
                assert rollout.members()
            await loading
            (report,) = rollout.members()
            assert report.loaded == {A.digest}

    asyncio.run(scenario())
