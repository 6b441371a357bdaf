"""The engine's own thread: it steps while there is work and hands each step's outputs to asyncio in one go."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ftray.core.errors import RequestError
from ftray.engine.api import Engine, EngineInfo, EngineStats, Output, Request
from ftray.engine.whole import joined
from ftray.serve.backend import Unavailable
from ftray.serve.errors import described

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINE_FAILED = "the engine failed"
"""Error of a request that was in a step which failed, for whatever reason."""
_MAX_FAILURES = 3
_STATS_WITHIN_S = 1.0
"""How long stats wait for a step to end before those of before are given."""


@dataclass
class _Stream:
    """Where a request's outputs, or the exception that ends it, are delivered."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Output | Exception]"
    request: Request
    begun: bool = False
    """Something of its group was handed out."""

    @property
    def group(self) -> str:
        """Those of a group have begun, and are given up, together."""
        return self.request.group or self.request.id

    @property
    def num_answers(self) -> int:
        """Places it takes."""
        return self.request.sampling.n


class EngineLoop:
    """Runs an engine in a thread; a `Backend` for the HTTP layer of the same process.

    Args:
        engine: owned by the thread from `start` on.
        max_answers: answers held at once, running and waiting; more are refused with 429, the latest of the tenant
            first that holds most for its weight. A tenant that holds none gets one in any case.
        max_step_s: a step that takes longer hangs, and the loop is not healthy any more.
    """

    def __init__(self, engine: Engine, max_answers: int, max_step_s: float = 120.0) -> None:
        self._engine = engine
        self._max_answers = max_answers
        self._max_step_s = max_step_s
        self._step_began_s: float | None = None
        self._stats = engine.stats()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._streams: dict[str, _Stream] = {}
        self._thread = threading.Thread(target=self._run, name="ftray-engine", daemon=True)

    def start(self) -> "EngineLoop":
        """Start the thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread after the step it is in; streams that go on end as unavailable."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def healthy(self) -> bool:
        """False once the thread ends, step after step failed or one hangs."""
        began_s = self._step_began_s  # read once: the thread changes it
        hangs = began_s is not None and time.monotonic() - began_s > self._max_step_s
        return self._thread.is_alive() and not self._stopping and self._failures < _MAX_FAILURES and not hangs

    async def info(self) -> EngineInfo:
        """See `Backend.info`."""
        return self._engine.info

    async def stats(self) -> EngineStats:
        """See `Backend.stats`; those of before while a step takes long."""
        if not self.healthy:
            raise Unavailable("the engine has stopped, hangs or fails at every step")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STATS_WITHIN_S):
                self._stats = await self.call(lambda engine: engine.stats())
        return self._stats

    async def generate(self, request: Request, *, beyond_limit: bool = False) -> AsyncGenerator[Output, None]:
        """See `Backend.generate`; `beyond_limit` lets our own few requests in when there is no place left."""
        if not self.healthy:
            raise Unavailable("the engine has stopped")
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue(), request)
        if not beyond_limit:
            self._make_room(stream)
        self._streams[request.id] = stream
        going = stream.num_answers
        try:
            self._post(lambda: self._add(request))
            while going:
                items = [await stream.queue.get()]
                while not stream.queue.empty():
                    items.append(stream.queue.get_nowait())
                for item in _coalesced(items):
                    if isinstance(item, Exception):
                        raise item
                    if not stream.begun:
                        self._begin(stream.group)
                    going = 0 if item.finish_reason == "error" else going - (item.finish_reason is not None)
                    yield item
        finally:
            self._streams.pop(request.id, None)
            # Also after its end: a failed step ends requests that the engine is yet to see.
            with contextlib.suppress(Unavailable):
                self._post(lambda: self._engine.cancel(request.id))

    def _begin(self, group: str) -> None:
        for stream in list(self._streams.values()):
            stream.begun |= stream.group == group

    def _make_room(self, stream: _Stream) -> None:
        """Refuse (429) what finds no place, or else the latest requests of a tenant that holds more for its weight.

        Longest queue drop (Suter et al., "Buffer management schemes for supporting TCP", 1999): a
        tenant that floods is refused itself, and leaves the others their places. What has begun is never given up,
        so one answer of a tenant that holds nothing is taken beyond the limit. More than all places is a 400.
        """
        if stream.num_answers > self._max_answers:
            message = f"n: {stream.num_answers} answers at once; ask for at most {self._max_answers}"
            raise RequestError(message, param="n")
        streams = list(self._streams.values())
        missing = sum(other.num_answers for other in streams) + stream.num_answers - self._max_answers
        if missing <= 0:
            return
        shares: defaultdict[str, float] = defaultdict(float)
        for other in [*streams, stream]:
            shares[other.request.tenant] += other.num_answers / other.request.weight
        heaviest = max(shares, key=shares.__getitem__)
        dropped: set[str] = set()  # groups, of which every stream goes
        for other in reversed(streams if shares[heaviest] > shares[stream.request.tenant] else []):
            if other.request.tenant == heaviest and not other.begun:
                if missing > 0:
                    dropped.add(other.group)
                missing -= other.num_answers if other.group in dropped else 0
        full = RequestError("the endpoint is full; try again shortly", status=429, code="overloaded")
        if missing > 0:
            tenant = stream.request.tenant
            if stream.num_answers == 1 and all(other.request.tenant != tenant for other in streams):
                return
            raise full
        gone = [other.request.id for other in streams if other.group in dropped]
        self._deliver([(name, full) for name in gone])
        for name in gone:
            del self._streams[name]

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run a function on the engine between two steps and return its result. Raises `Unavailable`."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                result = function(self._engine)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._post(run)
        return await asyncio.wrap_future(future)

    def _post(self, command: Callable[[], None]) -> None:
        """Have the thread run a command; every command posted is run. Raises `Unavailable` once it stops."""
        with self._wake:
            if self._stopping:
                raise Unavailable("the engine has stopped")
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._wake:
                    while not (self._inbox or self._stopping or self._engine.has_work()):
                        self._wake.wait()
                self._obey()
                if self._engine.has_work() and not self._stopping:
                    self._step_began_s = time.monotonic()
                    self._step()
                    self._step_began_s = None
        except Exception as error:
            logger.error("the engine's thread ends: %s", described(error))
        finally:
            with self._wake:
                self._stopping = True
            self._obey()
            gone = Unavailable("the engine is shutting down")
            self._deliver([(name, gone) for name in list(self._streams)])

    def _obey(self) -> None:
        """Run the commands that have come; one that fails must not keep the others from running."""
        with self._wake:
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            try:
                command()
            except Exception as error:
                logger.error("a command to the engine failed: %s", described(error))

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        # Whatever it is, those in flight must hear of it, and the next requests may well succeed.
        except Exception as error:
            self._failures += 1
            logger.error("engine step failed: %s", described(error))
            names = list(self._streams)
            for name in names:
                self._engine.cancel(name)
            failure = {"text": "", "token_ids": [], "finish_reason": "error", "error": ENGINE_FAILED}
            self._deliver([(name, Output(id=name, **failure)) for name in names])  # type: ignore[arg-type]
        else:
            self._failures = 0
            self._deliver([(output.id, output) for output in outputs])

    def _add(self, request: Request) -> None:
        if request.id not in self._streams:
            return  # its client left before the engine saw it
        try:
            self._engine.add(request)
        except RequestError as error:
            self._deliver([(request.id, error)])
        except Exception as error:
            logger.error("request not taken: %s", described(error))
            self._deliver([(request.id, RuntimeError(ENGINE_FAILED))])

    def _deliver(self, items: list[tuple[str, Any]]) -> None:
        """One call per event loop, however many requests gained something."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}
        for name, item in items:
            if stream := self._streams.get(name):
                by_loop.setdefault(stream.loop, []).append((stream.queue, item))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # the loop was closed while its requests were in flight
                logger.warning("%d requests lost their event loop", len(pairs))


def _coalesced(items: Sequence[Output | Exception]) -> list[Output | Exception]:
    """What has come while the reader was busy, in one output for each answer: fewer, larger pieces to send on."""
    outputs: dict[int, list[Output]] = {}
    for item in items:
        if isinstance(item, Exception):
            return [*map(joined, outputs.values()), item]
        outputs.setdefault(item.index, []).append(item)
    return [joined(parts) for parts in outputs.values()]


def _put_all(pairs: list[tuple["asyncio.Queue[Any]", Any]]) -> None:
    for queue, item in pairs:
        queue.put_nowait(item)
