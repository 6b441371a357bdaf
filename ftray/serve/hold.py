"""What one engine replica holds: deltas are brought, probed beside the traffic, and let go when unused."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftray.config.serve import GoldenConfig
from ftray.core.errors import FtrayError
from ftray.engine.api import Engine, Request, Sampling, Source
from ftray.serve.backend import ServedModel, Unavailable
from ftray.serve.errors import PassingError, described, is_passing
from ftray.serve.loop import ENGINE_FAILED, EngineLoop
from ftray.serve.prompts import Prompts
from ftray.serve.schema import ChatBody, CompletionBody

logger = logging.getLogger(__name__)

_PROBE_TEXT = "Hello"
_RETRY_S = 1.0
"""Before what failed is tried again; twice as long after each time."""
_MAX_RETRY_S = 60.0


@dataclass(frozen=True)
class _Failure:
    why: str
    passing: bool
    delay_s: float
    retry_at_s: float


class Holder:
    """Brings an engine's deltas to what is wanted of it.

    Args:
        loop: the engine.
        prompts: of the base, for the probes.
        bring: gives the folder of a delta on this machine; raises `FtrayError`.
        golden: questions that versions must get right.
    """

    def __init__(
        self,
        loop: EngineLoop,
        prompts: Prompts,
        bring: Callable[[ServedModel], str],
        golden: Sequence[GoldenConfig] = (),
    ) -> None:
        self._loop = loop
        self._prompts = prompts
        self._bring = bring
        self._golden = golden
        self._busy = asyncio.Lock()
        self._failures: dict[str, _Failure] = {}
        self.loaded: frozenset[str] = frozenset()

    @property
    def failed(self) -> dict[str, str]:
        """Digests whose files or answers are not as they must be, and why."""
        return {digest: found.why for digest, found in self._failures.items() if not found.passing}

    @property
    def delayed(self) -> dict[str, str]:
        """Digests that could not be had for a reason that may pass, and the reason."""
        return {digest: found.why for digest, found in self._failures.items() if found.passing}

    async def follow(self, models: Sequence[ServedModel]) -> None:
        """Hold these deltas and no others; one that fails is in `failed` or `delayed`, and tried again later.

        Raises:
            Unavailable: if the engine has stopped.
        """
        async with self._busy:
            digests = {model.digest for model in models}
            self._failures = {digest: it for digest, it in self._failures.items() if digest in digests}
            for digest in self.loaded - digests:
                await self._drop(digest)
            for model in models:
                failure = self._failures.get(model.digest)
                due = failure is None or time.monotonic() >= failure.retry_at_s
                if model.digest not in self.loaded and due:
                    await self._take(model)

    async def _take(self, model: ServedModel) -> None:
        try:
            brought = [await asyncio.to_thread(self._bring, model)]

            def source() -> str:
                # A copy on this machine may have made room for others by the time its files are read again.
                return brought.pop() if brought else self._brought_again(model)

            await self._loop.call(lambda engine: _register(engine, model.digest, source))
            await self._probe(model)
        except Unavailable:
            raise
        except Exception as error:  # whatever it is, the others are to be loaded
            self._note(model, error)
            await self._forget(model.digest)
        else:
            self._failures.pop(model.digest, None)
            self.loaded |= {model.digest}

    def _brought_again(self, model: ServedModel) -> str:
        try:
            return self._bring(model)
        except (FtrayError, OSError) as error:
            logger.error("%s cannot be read again: %s", model.ref, _line(error))
            raise PassingError(f"{model.ref}: not to be had now; try again shortly") from error

    def _note(self, model: ServedModel, error: Exception) -> None:
        logger.error("%s is not served: %s", model.ref, _line(error))
        before = self._failures.get(model.digest)
        delay_s = min(2 * before.delay_s, _MAX_RETRY_S) if before else _RETRY_S
        why = f"{model.ref}: {_line(error)}"
        self._failures[model.digest] = _Failure(why, is_passing(error), delay_s, time.monotonic() + delay_s)

    async def _drop(self, digest: str) -> None:
        """Let go of a delta; one with requests in flight stays until the next time."""
        if await self._forget(digest):
            self.loaded -= {digest}

    async def _forget(self, digest: str) -> bool:
        try:
            await self._loop.call(lambda engine: engine.unload_delta(digest))
        except FtrayError:
            return False
        return True

    async def _probe(self, model: ServedModel) -> None:
        """Ask a delta that nobody else may ask yet. Raises `FtrayError` if its answers are not as they must be."""
        await self._ask(model, _PROBE_TEXT, max_tokens=2, chat=False)
        for golden in self._golden:
            if golden.delta != model.name:
                continue
            answer = await self._ask(model, golden.prompt, max_tokens=golden.max_tokens, chat=True)
            if golden.contains not in answer:
                raise FtrayError(
                    f"golden: {golden.prompt[:60]!r} is not answered with {golden.contains[:60]!r}"
                )

    async def _ask(self, model: ServedModel, text: str, *, max_tokens: int, chat: bool) -> str:
        limit = (await self._loop.info()).max_length
        if chat and self._prompts.has_template:
            body = ChatBody.model_validate({"model": "", "messages": [{"role": "user", "content": text}]})
            ids = await self._prompts.chat(body, limit)
        else:
            (ids,) = await self._prompts.completions(CompletionBody(model="", prompt=text), limit)
        request = Request(
            id=f"probe-{uuid.uuid4().hex}",
            prompt_ids=ids,
            delta=model.digest,
            sampling=Sampling(max_tokens=max_tokens),
        )
        parts = []
        async for output in self._loop.generate(request, beyond_limit=True):
            if output.finish_reason == "error":
                passing = output.status == 503 or output.error in (None, ENGINE_FAILED)
                raise (PassingError if passing else FtrayError)(output.error or ENGINE_FAILED)
            parts.append(output.text)
        return "".join(parts)


def _register(engine: Engine, name: str, source: Source) -> None:
    if name not in engine.deltas():  # it may be known from a time when it could not be let go
        engine.register_delta(name, source)


def _line(error: Exception) -> str:
    known = isinstance(error, FtrayError | OSError)
    return " ".join(str(error).split())[:300] if known else described(error)
