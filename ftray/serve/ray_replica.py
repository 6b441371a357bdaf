"""The deployment that holds an engine: the base, its deltas and the thread that steps."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import torch
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ftray.config.serve import ServeConfig
from ftray.core.errors import RequestError
from ftray.engine.api import EngineInfo, EngineStats, Output, Request
from ftray.model.precision import bound_kernels
from ftray.registry.registry import Registry
from ftray.serve.backend import Unavailable
from ftray.serve.errors import described, internal
from ftray.serve.follow import EngineFollower, repeat
from ftray.serve.hold import Holder
from ftray.serve.loop import EngineLoop
from ftray.serve.models import bring
from ftray.serve.prompts import Prompts
from ftray.serve.ray_link import RayControl
from ftray.serve.ray_router import AffinityRouter

logger = logging.getLogger(__name__)

MAX_ONGOING = 10_000
"""Far above what the engine's own bounded queue admits, so that it and not the router refuses the excess."""

_PRODUCTS, _OTHER_KERNELS = 5, 48
"""Matrix products of a layer and the head: kernels are kept for steps that only decode, of any number of rows, and
for some others. Prompts bring ever new lengths."""

_SWITCH_S = 0.0005
"""How long the event loop may keep Python from the engine's thread, which wants it between any two operations."""


@dataclass(frozen=True)
class Refused:
    """A `RequestError` on its way through the handle: raised, it would come out wrapped and logged by Ray."""

    message: str
    status: int
    code: str
    param: str | None

    def error(self) -> RequestError:
        """The error itself."""
        return RequestError(self.message, status=self.status, code=self.code, param=self.param)


def _refused(error: RequestError) -> Refused:
    return Refused(str(error), error.status, error.code, error.param)


class Gone:
    """This replica cannot answer now; another may take the request if no token was sent."""


@serve.deployment(
    name="engine",
    max_ongoing_requests=MAX_ONGOING,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=5,
    health_check_timeout_s=30,
    request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),  # type: ignore[arg-type]
)
class EngineReplica:
    """One engine over one base; it is routed to once it holds what the others hold."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ServeConfig, control: "DeploymentHandle[Any]"
    ) -> None:
        bound_kernels(_PRODUCTS * config.engine.max_num_seqs + _OTHER_KERNELS)
        torch.set_num_threads(max(1, int(config.num_cpus)))
        sys.setswitchinterval(_SWITCH_S)
        engine = await asyncio.to_thread(config.engine.build, config.base)
        registry = Registry(config.registry)
        self._loop = EngineLoop(engine, config.engine.max_num_seqs + config.max_queued_requests).start()
        prompts = Prompts(config.engine.load_tokenizer(config.base))
        holder = Holder(self._loop, prompts, lambda model: bring(registry, model), config.golden)
        self._follower = EngineFollower(self._loop, holder, RayControl(control), config.follow_s)
        await self._follower.follow()
        self._following = asyncio.create_task(repeat(self._follower.follow, config.follow_s))

    async def generate(
        self, request: Request, attempt: int = 0
    ) -> AsyncGenerator[Output | Refused | Gone, None]:
        """Outputs of a request; a refusal, a stopped engine and a mistake of ours are said in band.

        Args:
            request: the request.
            attempt: how often it was tried before; the router reads it.
        """
        del attempt
        if not self._follower.has(request.delta):
            # It was switched to before this replica heard of it.
            with contextlib.suppress(Unavailable):
                await self._follower.follow()
            if not self._follower.has(request.delta):
                yield Gone()
                return
        outputs = self._loop.generate(request)
        try:
            async for output in outputs:
                yield output
        except RequestError as error:
            yield _refused(error)
        except Unavailable:
            yield Gone()
        except Exception as error:
            logger.error("a request failed: %s", described(error))
            yield _refused(internal())
        finally:
            await outputs.aclose()

    async def info(self) -> EngineInfo:
        """Facts about the engine."""
        return await self._loop.info()

    async def stats(self) -> EngineStats:
        """Load of the engine."""
        return await self._loop.stats()

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self._loop.healthy:
            raise RuntimeError("the engine thread has stopped, hangs or fails at every step")
