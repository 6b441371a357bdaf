"""The deployment that decides: one small actor on the head node, with the admin API on its loopback."""

import asyncio
import contextlib
from typing import Any

from ray import serve

from ftray.config.serve import ServeConfig
from ftray.serve.admin import AdminServer, create_admin_app
from ftray.serve.control import Control, Orders
from ftray.serve.models import base_model, follower
from ftray.serve.quota import Grant, Kind
from ftray.serve.rollout import Report


@serve.deployment(
    name="control",
    max_ongoing_requests=10_000,
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    graceful_shutdown_timeout_s=1,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=2,
)
class ControlReplica:
    """A `Control` that others reach; when it dies, Ray Serve starts another, which learns what it must know."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ServeConfig, run: str = ""
    ) -> None:
        follow = await asyncio.to_thread(follower, config)
        self._control = Control(config, await asyncio.to_thread(base_model, config), follow.models, run)
        await self._control.look()
        self._running = asyncio.create_task(self._control.run())
        self._admin: AdminServer | None = None
        if config.admin_port is not None:
            assert config.admin_token_sha256 is not None
            app = create_admin_app(self._control, config.admin_token_sha256)
            self._admin = AdminServer(app, config.admin_port)
            await self._admin.start()

    async def sync(self, report: Report) -> Orders:
        """See `Control.sync`."""
        return self._control.sync(report)

    async def lease(self, tenant: str, kind: Kind, needed: int) -> Grant:
        """See `Lender.lease`."""
        return await self._control.lease(tenant, kind, needed)

    async def seats(self, tenant: str, front: str, wanted: int) -> int:
        """See `Lender.seats`."""
        return await self._control.seats(tenant, front, wanted)

    async def status(self) -> dict[str, Any]:
        """See `Control.status`."""
        return self._control.status() | {"admin_port": self._admin.port if self._admin else None}

    async def drain(self) -> int:
        """See `Control.drain`."""
        return self._control.drain()

    async def end(self) -> None:
        """See `Control.end`."""
        self._control.end()

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if self._running.done():
            raise RuntimeError("nothing follows the registry any more")

    async def __del__(self) -> None:
        """Called by Ray Serve when the deployment ends."""
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        if self._admin:
            await self._admin.stop()
