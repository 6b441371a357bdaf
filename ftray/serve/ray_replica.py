"""The deployment that holds an engine: the base, its deltas and the thread that steps."""

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import torch
from ray import serve

from ftray.config.serve import ServeConfig
from ftray.core.errors import RequestError
from ftray.engine.api import EngineInfo, EngineStats, Output, Request
from ftray.serve.backend import ServedModel, Unavailable
from ftray.serve.errors import described, internal
from ftray.serve.loop import EngineLoop
from ftray.serve.models import load_models

logger = logging.getLogger(__name__)

MAX_ONGOING = 10_000
"""Far above what the engine's own bounded queue admits, so that it and not the router refuses the excess."""


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
    """The engine of this replica has stopped; another may take the request if no token was sent."""


@serve.deployment(
    name="engine",
    max_ongoing_requests=MAX_ONGOING,
    graceful_shutdown_timeout_s=5,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=5,
    health_check_timeout_s=30,
)
class EngineReplica:
    """One engine over one base."""

    def __init__(self, config: ServeConfig, models: Sequence[ServedModel]) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        engine = config.engine.build(config.base)
        load_models(engine, models)
        self._loop = EngineLoop(engine, config.engine.max_num_seqs + config.max_queued_requests).start()

    async def generate(self, request: Request) -> AsyncGenerator[Output | Refused | Gone, None]:
        """Outputs of a request; a refusal, a stopped engine and a mistake of ours are said in band."""
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
            raise RuntimeError("the engine thread has stopped or fails at every step")
