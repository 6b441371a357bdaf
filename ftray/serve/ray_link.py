"""The control over a handle of Ray Serve."""

from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ftray.core.errors import RequestError
from ftray.serve.backend import Unavailable
from ftray.serve.control import Orders
from ftray.serve.quota import Grant, Kind
from ftray.serve.rollout import Report


class RayControl:
    """A `ControlLink`; while the control is being replaced, nothing is lent (503)."""

    def __init__(self, control: "DeploymentHandle[Any]") -> None:
        self._control = control

    async def sync(self, report: Report) -> Orders:
        """See `Control.sync`. Raises `Unavailable`."""
        orders: Orders = await self._call("sync", report)
        return orders

    async def lease(self, tenant: str, kind: Kind, needed: int) -> Grant:
        """See `Lender.lease`."""
        grant: Grant = await self._count("lease", tenant, kind, needed)
        return grant

    async def seats(self, tenant: str, front: str, wanted: int) -> int:
        """See `Lender.seats`."""
        granted: int = await self._count("seats", tenant, front, wanted)
        return granted

    async def _count(self, method: str, *arguments: Any) -> Any:
        try:
            return await self._call(method, *arguments)
        except Unavailable:
            message = "quotas cannot be counted at this moment; try again shortly"
            raise RequestError(message, status=503, code="unavailable") from None

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._control, method).remote(*arguments)
        except (RayError, RayServeException) as error:
            raise Unavailable("the control does not answer") from error
