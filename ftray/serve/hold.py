"""What one engine replica holds: deltas are brought, probed beside the traffic, and let go when unused."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence

from ftray.config.serve import GoldenConfig
from ftray.core.errors import FtrayError
from ftray.engine.api import Engine, Request, Sampling
from ftray.serve.backend import ServedModel
from ftray.serve.loop import EngineLoop
from ftray.serve.prompts import Prompts
from ftray.serve.schema import ChatBody, CompletionBody

logger = logging.getLogger(__name__)

_PROBE_TEXT = "Hello"


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
        self.loaded: frozenset[str] = frozenset()
        self.failed: dict[str, str] = {}

    async def follow(self, models: Sequence[ServedModel]) -> None:
        """Hold these deltas and no others; what cannot be loaded or fails its probe is noted in `failed`."""
        async with self._busy:
            digests = {model.digest for model in models}
            self.failed = {digest: why for digest, why in self.failed.items() if digest in digests}
            for digest in self.loaded - digests:
                await self._drop(digest)
            for model in models:
                if model.digest not in self.loaded and model.digest not in self.failed:
                    await self._take(model)

    async def _take(self, model: ServedModel) -> None:
        try:
            folder = await asyncio.to_thread(self._bring, model)
            await self._loop.call(lambda engine: _register(engine, model.digest, folder))
        except FtrayError as error:
            self._refuse(model, error)
            return
        try:
            await self._probe(model)
        except FtrayError as error:
            self._refuse(model, error)
            await self._forget(model.digest)
        else:
            self.loaded |= {model.digest}

    def _refuse(self, model: ServedModel, error: FtrayError) -> None:
        problem = " ".join(str(error).split())[:300]
        logger.error("%s is not served: %s", model.ref, problem)
        self.failed[model.digest] = f"{model.ref}: {problem}"

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
                raise FtrayError(output.error or "the engine failed")
            parts.append(output.text)
        return "".join(parts)


def _register(engine: Engine, name: str, folder: str) -> None:
    if name not in engine.deltas():  # it may be known from a time when it could not be let go
        engine.register_delta(name, folder)
