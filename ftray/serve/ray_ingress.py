"""The deployment that speaks HTTP and hands requests to the engine replicas."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ftray.config.serve import ServeConfig
from ftray.engine.api import EngineInfo, EngineStats, Output, Request
from ftray.serve.backend import Unavailable
from ftray.serve.follow import FrontFollower, repeat
from ftray.serve.front import Front, View
from ftray.serve.http import create_app
from ftray.serve.prompts import Prompts
from ftray.serve.quota import Gate
from ftray.serve.ray_link import RayControl
from ftray.serve.ray_replica import MAX_ONGOING, Gone, Refused
from ftray.serve.usage import UsageLog

logger = logging.getLogger(__name__)

_ATTEMPTS = 6
_PAUSE_S = 0.1
"""Before the second attempt; each later one waits twice as long, 3.1 s in all."""


class RayBackend:
    """A `Backend` over a deployment handle."""

    def __init__(self, engine: "DeploymentHandle[Any]") -> None:
        self._engine = engine
        self._info: EngineInfo | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See `Backend.generate`. A request whose replica dies before its first token is tried elsewhere."""
        for attempt in range(_ATTEMPTS):
            started = False
            items: Any = self._engine.options(stream=True).generate.remote(request, attempt)
            try:
                async for item in items:
                    if isinstance(item, Refused):
                        raise item.error()
                    if isinstance(item, Gone):
                        raise Unavailable("the engine has stopped")
                    started = True
                    yield item
                return
            except RayTaskError:
                raise  # the replica lives; its mistake would be the same again
            except (RayError, RayServeException, Unavailable) as error:
                if started or attempt == _ATTEMPTS - 1:
                    raise Unavailable("the engine went away") from error
                logger.warning("a replica went away before the first token; trying another")
                await asyncio.sleep(_PAUSE_S * 2**attempt)
            finally:
                items.cancel()

    async def info(self) -> EngineInfo:
        """See `Backend.info`; asked once, all replicas being alike."""
        if self._info is None:
            self._info = await self._call("info")
        return self._info

    async def stats(self) -> EngineStats:
        """See `Backend.stats`; of one replica."""
        stats: EngineStats = await self._call("stats")
        return stats

    async def _call(self, method: str) -> Any:
        try:
            return await getattr(self._engine, method).remote()
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise Unavailable("the engine does not answer") from error


@serve.deployment(
    name="http",
    max_ongoing_requests=MAX_ONGOING,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_wait_loop_s=0.2,
)
@serve.ingress()
class Ingress:
    """The HTTP API in front of the engine replicas; holds the tokenizer, not the model."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ServeConfig, engine: "DeploymentHandle[Any]", control: "DeploymentHandle[Any]"
    ) -> None:
        front = Front(
            View(models=[]), keys=config.asks_for_keys, metrics_key_sha256=config.metrics_key_sha256
        )
        link = RayControl(control)
        gate = Gate(link, front.name)
        prompts = await asyncio.to_thread(lambda: Prompts(config.engine.load_tokenizer(config.base)))
        self._app = create_app(
            front,
            prompts,
            RayBackend(engine),
            gate,
            UsageLog(config.usage_folder, front.name),
            request_timeout_s=config.request_timeout_s,
        )
        follower = FrontFollower(front, gate, link)
        await follower.follow()
        self._following = asyncio.create_task(repeat(follower.follow, config.follow_s))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve after the constructor."""
        return self._app
