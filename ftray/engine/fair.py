"""Whose turn it is: tokens computed for each tenant, divided by its weight.

The tenant that was given least goes first (Sheng et al., "Fairness in serving large language models",
arXiv:2401.00588); one that had nothing to do starts where the least served of the others stands, so that idling
saves nothing up (start-time fair queueing, Goyal et al., 1996).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass
class _Account:
    served: float
    """Tokens divided by weight."""
    weight: float
    live: int = 0
    """Answers that wait or run."""
    tokens: int = 0


class FairShares:
    """The account of every tenant that has work, and of those that have had more than their share."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def arrive(self, tenant: str, weight: float) -> None:
        """An answer of a tenant enters."""
        account = self._accounts.get(tenant)
        if account is None or not account.live:
            served = max(self._floor(), account.served if account else 0.0)
            tokens = account.tokens if account else 0
            account = self._accounts[tenant] = _Account(served, weight, tokens=tokens)
        account.live += 1
        account.weight = weight

    def leave(self, tenant: str) -> None:
        """An answer of a tenant is over."""
        self._accounts[tenant].live -= 1
        if self._accounts[tenant].live:
            return
        # With nobody left there is nobody to be fair to; else a debt is kept until the others have caught up.
        floor = self._floor() if any(account.live for account in self._accounts.values()) else float("inf")
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.live or account.served > floor
        }

    def charge(self, tenant: str, tokens: int) -> None:
        """Tokens were computed for a tenant."""
        account = self._accounts[tenant]
        account.served += tokens / account.weight
        account.tokens += tokens

    def served(self, tenant: str) -> float:
        """Tokens for each unit of weight; comparable between tenants."""
        return self._accounts[tenant].served

    def rows(self, tenant: str, total: int) -> int:
        """Rows of so many that a tenant's weight gives it beside the others with work; one at least."""
        weights = sum(account.weight for account in self._accounts.values() if account.live)
        return max(1, int(total * self._accounts[tenant].weight / weights + 1e-9))

    def part(self, tenants: Iterable[str], rows: Mapping[str, int]) -> float:
        """Sum of what rows of these tenants are due, each tenant's weight being shared by its rows."""
        return sum(self._accounts[tenant].weight / rows[tenant] for tenant in tenants)

    def tokens(self) -> dict[str, int]:
        """Tokens computed for every tenant with work since it last had none."""
        return {name: account.tokens for name, account in self._accounts.items() if account.live}

    def _floor(self) -> float:
        return min((account.served for account in self._accounts.values() if account.live), default=0.0)
