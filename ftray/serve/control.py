"""The endpoint's one place of decision: follows registry and tenants, counts quotas, tells engines and fronts.

Everything here can be lost: a new one learns from the registry, the tenants' file, the members' next reports and,
where there is a tenants' file, from a file of decisions beside it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.config.serve import ServeConfig
from ftray.config.tenant import TenantConfig
from ftray.core.errors import FtrayError, RequestError
from ftray.serve.backend import ServedModel
from ftray.serve.errors import described
from ftray.serve.front import View
from ftray.serve.kept import Decisions, DecisionStore
from ftray.serve.quota import Grant, Kind, Quotas
from ftray.serve.rollout import Report, Rollout
from ftray.serve.tenant_store import TenantStore
from ftray.serve.tenants import Access

logger = logging.getLogger(__name__)

Models = Callable[[str], list[ServedModel]]
"""What a reference means now; raises `FtrayError`."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a member is told in answer to its report."""

    hold: Sequence[ServedModel]
    """What engines are to hold."""
    view: View | None
    """What fronts are to offer; None: go on as before."""
    stop: bool = False
    """Engines are to end what they are doing."""


class Control:
    """See the module.

    Args:
        config: the endpoint's.
        base: what answers as the base.
        models: follows the registry.
        run: which start of the endpoint this is; a control that takes over has the same.
    """

    def __init__(self, config: ServeConfig, base: ServedModel, models: Models, run: str = "") -> None:
        self.quotas = Quotas()
        self.rollout = Rollout(base, member_s=max(5.0, 5 * config.follow_s))
        self.problems: dict[str, str] = {}
        """References that cannot be served as they are now, and why."""
        self.ended = False
        self.store = TenantStore(config.tenants_file) if config.tenants_file else None
        beside = self.store.path.with_name(f".{self.store.path.name}.decisions") if self.store else None
        self._kept = DecisionStore(beside, run)
        decided = self._kept.read(Decisions(list(config.deltas)))
        self.refs, self.draining, self.rollout.rejected = decided.refs, decided.draining, decided.rejected
        self._config = config
        self._models = models
        self._tenants: list[TenantConfig] = []
        self._stamp: tuple[int, int] | None = None
        self._looking = asyncio.Lock()

    @property
    def tenants(self) -> list[TenantConfig]:
        """Who may ask."""
        return self._tenants

    async def run(self) -> None:
        """Look at registry and tenants again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:  # the next time may be better
                logger.error("registry not followed: %s", described(error))
            await asyncio.sleep(self._config.follow_s)

    async def look(self) -> None:
        """Take over what registry and tenants' file say now; they are read off the event loop."""
        async with self._looking:
            await asyncio.to_thread(self._look_at_tenants)
            found, self.problems = await asyncio.to_thread(self._look_at_registry, tuple(self.refs))
            self.quotas.set_tenants(self._tenants)
            self.rollout.want(found)
            decided = Decisions(list(self.refs), self.draining, dict(self.rollout.rejected))
            await asyncio.to_thread(self._kept.write, decided)

    def _look_at_registry(self, refs: Sequence[str]) -> tuple[list[ServedModel], dict[str, str]]:
        found: dict[str, ServedModel] = {}
        problems: dict[str, str] = {}
        for ref in refs:
            try:
                found |= {model.id: model for model in self._models(ref)}
            except (FtrayError, OSError) as error:
                problems[ref] = " ".join(str(error).split())[:300]
                if self.problems.get(ref) != problems[ref]:
                    logger.error("%s stays as it is: %s", ref, problems[ref])
                # What cannot be read now is served on as it was.
                before = list(self.rollout.wanted.items())
                found |= {id: model for id, model in before if _stands_for(ref, id)}
        return list(found.values()), problems

    def sync(self, report: Report) -> Orders:
        """Hear a member and tell it what to do."""
        self.rollout.hear(report)
        models = self.rollout.offered()
        view = View(
            models=models,
            pending=self.rollout.pending(),
            tenants=tuple(self._tenants),
            draining=self.draining,
        )
        hold = self.rollout.to_hold()
        return Orders(hold=hold, view=view if models or self.draining else None, stop=self.ended)

    async def lease(self, tenant: str, kind: Kind, needed: int) -> Grant:
        """See `Lender.lease`."""
        return await self.quotas.lease(tenant, kind, needed)

    async def seats(self, tenant: str, front: str, wanted: int) -> int:
        """See `Lender.seats`."""
        return await self.quotas.seats(tenant, front, wanted)

    async def load(self, ref: str) -> None:
        """Serve a further reference. Raises `FtrayError`."""
        await asyncio.to_thread(self._models, ref)
        if ref not in self.refs:
            self.refs.append(ref)
        await self.look()

    async def unload(self, ref: str) -> None:
        """Serve a reference no longer; requests in flight end. Raises `RequestError` (404)."""
        if ref not in self.refs:
            served = ", ".join(self.refs) or "none"
            message = f"{ref[:100]}: is not served; served are: {served}"
            raise RequestError(message, status=404, code="model_not_found")
        self.refs.remove(ref)
        await self.look()

    def retry(self) -> None:
        """Give rejected versions another chance."""
        self.rollout.rejected.clear()

    def drain(self) -> int:
        """Take no more requests; returns how many are being answered, plus the fronts yet to hear of it."""
        self.draining = True
        fronts = [report for report in self.rollout.members() if not report.is_engine]
        return sum(report.in_flight + (not report.draining) for report in fronts)

    def end(self) -> None:
        """Have the engines stop; streams that still go on end with an error."""
        self.draining = self.ended = True

    def status(self) -> dict[str, Any]:
        """What is served, what waits, what was refused, and who is there."""
        rollout, members, delays = self.rollout, self.rollout.members(), self.rollout.delays()
        return {
            "models": [_row(model) for model in [rollout.base, *rollout.live.values()]],
            "pending": [
                _row(model) | {"problem": delays.get(model.digest)}
                for id, model in rollout.wanted.items()
                if id in rollout.pending() and model.digest not in rollout.rejected
            ],
            "rejected": [
                _row(model) | {"problem": rollout.rejected[model.digest]}
                for model in rollout.wanted.values()
                if model.digest in rollout.rejected
            ],
            "problems": [{"ref": ref, "problem": problem} for ref, problem in self.problems.items()],
            "engines": [_engine_row(member) for member in members if member.is_engine],
            "fronts": [
                {"name": member.member, "in_flight": member.in_flight}
                for member in members
                if not member.is_engine
            ],
            "draining": self.draining,
        }

    def _look_at_tenants(self) -> None:
        stamp = self.store.stamp() if self.store else (0, 0)
        if stamp == self._stamp:
            return
        try:
            tenants = [*self._config.tenants, *(self.store.list() if self.store else [])]
            Access(tenants, [], self._config.metrics_key_sha256)  # two that cannot be told apart
        except (FtrayError, OSError) as error:
            logger.error("tenants stay as they are: %s", " ".join(str(error).split())[:300])
            return
        self._tenants, self._stamp = tenants, stamp


def _row(model: ServedModel) -> dict[str, Any]:
    return {"id": model.id, "ref": model.ref, "digest": model.digest}


def _engine_row(report: Report) -> dict[str, Any]:
    load = {name: getattr(report.stats, name) for name in _LOAD} if report.stats else {}
    return {"name": report.member, "loaded": len(report.loaded), **load}


_LOAD = ("running", "waiting", "blocks_used", "blocks_total", "slots_used", "slots_total")


def _stands_for(ref: str, id: str) -> bool:
    """Whether an id comes from a reference: the reference itself, or an alias of a bare name."""
    return id == ref or ("@" not in ref and id.startswith(f"{ref}@"))
