"""Quotas of tenants: counted in one place, leased to the HTTP fronts, so that they hold for all fronts together.

A front asks for a little more than one request needs and spends it locally, so most requests cost no call. What a
front has leased and not used is lost when it ends, never used twice.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from ftray.config.tenant import TenantConfig
from ftray.core.errors import RequestError

Kind = Literal["requests", "tokens"]

LEASE_S = 30.0
"""How long what was leased may be spent."""
SEAT_S = 15.0
"""How long the places of a front stay its own when it is not heard of."""
_SHARE = 20
"""A lease is at most this part of a quota, or what one request needs."""


@dataclass(frozen=True)
class Grant:
    """What was leased; 0 with the seconds after which it is worth asking again."""

    amount: int
    retry_after_s: int = 1


class Lender(Protocol):
    """Leases shares of quotas; a front may be in another process."""

    async def lease(self, tenant: str, kind: Kind, needed: int) -> Grant:
        """At least `needed` of what the tenant may use in a minute, or nothing."""
        ...

    async def seats(self, tenant: str, front: str, wanted: int) -> int:
        """How many requests of a tenant a front may have at once, at most `wanted`; replaces what it had."""
        ...


class Quotas:
    """The counts themselves.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._tenants: dict[str, TenantConfig] = {}
        self._seats: dict[str, dict[str, tuple[int, float]]] = {}

    def set_tenants(self, tenants: list[TenantConfig]) -> None:
        """Use these tenants' quotas from now on."""
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._seats = {name: held for name, held in self._seats.items() if name in self._tenants}

    async def lease(self, tenant: str, kind: Kind, needed: int) -> Grant:
        """See `Lender.lease`."""
        limit = self._limit(tenant, kind)
        if limit is None:
            return Grant(needed)
        item = RateLimitItemPerMinute(limit)
        for amount in sorted({max(needed, limit // _SHARE), needed}, reverse=True):
            if self._limiter.hit(item, tenant, kind, cost=amount):
                return Grant(amount)
        stats = self._limiter.get_window_stats(item, tenant, kind)
        wait_s = max(stats.reset_time - time.time(), (needed - stats.remaining) * 60 / limit)
        return Grant(0, max(1, math.ceil(min(wait_s, 60.0))))

    async def seats(self, tenant: str, front: str, wanted: int) -> int:
        """See `Lender.seats`."""
        config = self._tenants.get(tenant)
        if config is None or config.max_concurrent_requests is None:
            return wanted
        now = self._clock()
        held = self._seats.setdefault(tenant, {})
        for name, (_, until) in list(held.items()):
            if until < now:
                del held[name]
        others = sum(count for name, (count, _) in held.items() if name != front)
        granted = max(0, min(wanted, config.max_concurrent_requests - others))
        held[front] = (granted, now + SEAT_S)
        return granted

    def _limit(self, tenant: str, kind: Kind) -> int | None:
        config = self._tenants.get(tenant)
        if config is None:
            return None
        return config.requests_per_minute if kind == "requests" else config.tokens_per_minute


@dataclass
class _Purse:
    """What is left of a lease."""

    amount: int = 0
    until: float = 0.0


class Gate:
    """Where a front admits requests within their tenants' quotas.

    Args:
        lender: leases them.
        front: the front's own name.
        clock: seconds, monotonic.
    """

    def __init__(self, lender: Lender, front: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._lender = lender
        self._front = front
        self._clock = clock
        self._purses: dict[tuple[str, Kind], _Purse] = {}
        self._inside: Counter[str] = Counter()
        self._granted: Counter[str] = Counter()

    async def enter(self, tenant: TenantConfig | None) -> "Admission":
        """Admit a request, or raise `RequestError` (429 with the seconds after which to come again)."""
        admission = Admission(self, tenant)
        if tenant is None:
            return admission
        if tenant.requests_per_minute is not None:
            await self.take(tenant.name, "requests", 1)
        if tenant.max_concurrent_requests is not None:
            await self._sit(tenant)
            admission.seated = True
        return admission

    async def take(self, tenant: str, kind: Kind, needed: int) -> None:
        """Spend some of a tenant's quota, from the purse or a new lease. Raises `RequestError` (429)."""
        purse = self._purses.setdefault((tenant, kind), _Purse())
        if purse.until < self._clock():
            purse.amount = 0
        own = min(purse.amount, needed)
        purse.amount -= own  # before anything is awaited, so that no other request spends it too
        if own == needed:
            return
        grant = await self._lender.lease(tenant, kind, needed - own)
        if not grant.amount:
            purse.amount += own
            raise RequestError(
                f"more {kind} in a minute than this tenant may use; try again later",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=grant.retry_after_s,
            )
        purse = self._purses.setdefault((tenant, kind), purse)  # it may have been given back meanwhile
        purse.amount += grant.amount - (needed - own)
        purse.until = self._clock() + LEASE_S

    def now(self) -> float:
        """Seconds on the gate's clock."""
        return self._clock()

    def give_back(self, tenant: str, kind: Kind, amount: int, taken_at: float) -> None:
        """Put back what was not used; what was taken too long ago was of another minute, and is lost."""
        purse = self._purses.get((tenant, kind))
        if purse and self._clock() - taken_at <= LEASE_S:
            purse.amount += amount

    async def _sit(self, tenant: TenantConfig) -> None:
        name = tenant.name
        self._inside[name] += 1
        try:
            if self._inside[name] > self._granted[name]:
                self._granted[name] = await self._lender.seats(name, self._front, self._inside[name])
            if self._inside[name] > self._granted[name]:
                raise RequestError(
                    "more requests at once than this tenant may have; try again shortly",
                    status=429,
                    code="too_many_concurrent_requests",
                )
        except BaseException:
            self._inside[name] -= 1
            raise

    def leave(self, tenant: str) -> None:
        """A request that held a place has ended."""
        self._inside[tenant] -= 1

    async def renew(self) -> None:
        """Keep the places in use, give the others and empty purses back; to be called every few seconds."""
        now = self._clock()
        self._purses = {key: purse for key, purse in self._purses.items() if purse.until >= now}
        for name in list(self._granted):
            self._granted[name] = await self._lender.seats(name, self._front, self._inside[name])
            if not self._inside[name]:
                del self._granted[name], self._inside[name]


class Admission:
    """One admitted request, until `close`."""

    def __init__(self, gate: Gate, tenant: TenantConfig | None) -> None:
        self._gate = gate
        self._tenant = tenant
        self._reserved = 0
        self._reserved_at = 0.0
        self.seated = False

    async def reserve(self, tokens: int) -> None:
        """Count tokens that the request may use at most.

        Raises:
            RequestError: 429, or 400 if no minute has so many.
        """
        if self._tenant is None or self._tenant.tokens_per_minute is None:
            return
        if tokens > self._tenant.tokens_per_minute:
            raise RequestError(
                f"max_tokens: prompt and answer may take {tokens} tokens, the quota is"
                f" {self._tenant.tokens_per_minute} a minute; shorten one of them",
                code="tokens_exceed_quota",
                param="max_tokens",
            )
        self._reserved_at = self._gate.now()
        await self._gate.take(self._tenant.name, "tokens", tokens)
        self._reserved = tokens

    def close(self, used_tokens: int) -> None:
        """The request has ended; what it reserved and did not use goes back."""
        if self._tenant is None:
            return
        if self._reserved:
            unused = max(0, self._reserved - used_tokens)
            self._gate.give_back(self._tenant.name, "tokens", unused, self._reserved_at)
            self._reserved = 0
        if self.seated:
            self._gate.leave(self._tenant.name)
            self.seated = False
