"""How long steps take, and how much of prompts may stand beside rows that decode. Plain Python."""

_KEPT = 0.98
"""What a step counts for beside the one after it: the last fifty or so decide."""
_LEAST_SPREAD = 0.05
"""Relative variance of the tokens of steps below which nothing is learned about the price of one."""
_MOST = 3.0
"""A step counts for at most this many times what was expected of it: what held it up once is nobody's price."""
_CHUNK = 16
"""Tokens of prompts that a step may always have: a price that is too high is found out by paying it."""


class Pace:
    """Fits seconds of steps by least squares: one price for a step, one for each token beyond one a row.

    Args:
        prompt_share: time that prompts may add to a step in which answers decode, as a part of such a step's own.
    """

    def __init__(self, prompt_share: float) -> None:
        self.step_s = 0.0
        """Seconds of a step whose rows have one token each."""
        self._prompt_share = prompt_share
        self._token_s = 0.0
        self._steps = self._x = self._xx = self._t = self._xt = 0.0

    def note(self, extra: int, seconds: float) -> None:
        """A step with so many tokens beyond one a row took so long."""
        if self._token_s > 0 and self.step_s > 0:
            seconds = min(seconds, _MOST * (self.step_s + self._token_s * extra))
        values = (1.0, extra, extra * extra, seconds, extra * seconds)
        sums = (self._steps, self._x, self._xx, self._t, self._xt)
        self._steps, self._x, self._xx, self._t, self._xt = (
            _KEPT * total + value for total, value in zip(sums, values, strict=True)
        )
        spread = self._steps * self._xx - self._x**2
        if spread > _LEAST_SPREAD * self._x**2:
            self._token_s = (self._steps * self._xt - self._x * self._t) / spread
        self.step_s = (self._t - self._token_s * self._x) / self._steps

    def prompt_tokens(self, due: float) -> float:
        """Tokens beyond one a row that the next step may have; infinite as long as nothing is known.

        Args:
            due: what the rows with prompts are due, as a multiple of what those that decode are.
        """
        if self._token_s <= 0 or self.step_s <= 0:
            return float("inf")
        # Squared: a few that wait hardly slow the others down, while many begin at once, which makes later steps
        # cheaper, as weights are read once for all rows.
        return max(_CHUNK, max(self._prompt_share, due**2) * self.step_s / self._token_s)
