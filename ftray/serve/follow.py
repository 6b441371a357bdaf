"""How engines and HTTP fronts follow the control: they report every second or so and do what they are told."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol

from ftray.core.errors import RequestError
from ftray.serve.backend import Unavailable
from ftray.serve.control import Orders
from ftray.serve.errors import described
from ftray.serve.front import Front
from ftray.serve.hold import Holder
from ftray.serve.loop import EngineLoop
from ftray.serve.quota import Gate, Lender
from ftray.serve.rollout import Report

logger = logging.getLogger(__name__)


class ControlLink(Lender, Protocol):
    """The control, from where a member stands. Its methods raise `Unavailable` while it is being replaced."""

    async def sync(self, report: Report) -> Orders:
        """See `Control.sync`."""
        ...


async def repeat(step: Callable[[], Awaitable[object]], every_s: float) -> None:
    """Take a step again and again, until cancelled; one that fails is logged and the next one comes."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await step()
        except (Unavailable, RequestError):
            continue  # the control is being replaced; what is held and offered stays
        except Exception as error:
            logger.error("not followed: %s", described(error))


class EngineFollower:
    """Keeps one engine at what is wanted.

    Args:
        loop: the engine.
        holder: what it holds.
        control: who wants it.
        every_s: how often it reports while it loads, which may take longer than the control waits for a report.
    """

    def __init__(self, loop: EngineLoop, holder: Holder, control: ControlLink, every_s: float = 1.0) -> None:
        self.name = uuid.uuid4().hex[:12]
        self._loop = loop
        self._holder = holder
        self._control = control
        self._every_s = every_s

    def has(self, digest: str | None) -> bool:
        """Whether the engine can answer under a delta; None: the base."""
        return digest is None or digest in self._holder.loaded

    async def follow(self) -> None:
        """Report, do what is wanted and report meanwhile, and report what has come of it."""
        orders = await self._report()
        if orders.stop:
            return
        before = (self._holder.loaded, self._holder.failed)
        reporting = asyncio.create_task(repeat(self._report, self._every_s))
        try:
            await self._holder.follow(orders.hold)
        finally:
            reporting.cancel()
        if (self._holder.loaded, self._holder.failed) != before:
            await self._report()  # at once, so that a switch need not wait for the next time

    async def _report(self) -> Orders:
        """Say how things are; an order to stop is obeyed at once."""
        stats = await self._loop.stats()
        report = Report(
            member=self.name,
            is_engine=True,
            loaded=self._holder.loaded,
            failed=self._holder.failed,
            delayed=self._holder.delayed,
            stats=stats,
        )
        orders = await self._control.sync(report)
        if orders.stop:
            await asyncio.to_thread(self._loop.stop)
        return orders


class FrontFollower:
    """Keeps one HTTP front at what is offered, and its quotas renewed.

    Args:
        front: the front.
        gate: where it admits requests.
        control: who says what is offered.
    """

    def __init__(self, front: Front, gate: Gate, control: ControlLink) -> None:
        self._front = front
        self._gate = gate
        self._control = control

    async def follow(self) -> None:
        """Report and take over what is offered."""
        report = Report(
            member=self._front.name,
            is_engine=False,
            in_use=self._front.in_use(),
            in_flight=self._front.in_flight.total(),
            draining=self._front.view.draining,
        )
        orders = await self._control.sync(report)
        if orders.view is not None:
            self._front.update(orders.view)
        await self._gate.renew()
