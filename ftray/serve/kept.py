"""What an operator told the control, and what it refused, in a file that the next control of the endpoint reads."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftray.core.errors import FtrayError
from ftray.core.fs import read_json, write_json

logger = logging.getLogger(__name__)


@dataclass
class Decisions:
    """What the registry and the tenants' file do not say."""

    refs: list[str]
    """References that are served."""
    draining: bool = False
    rejected: dict[str, str] = field(default_factory=dict)
    """Digests no engine is to try again, and why."""


class DecisionStore:
    """Decisions in a file, readable by its owner and replaced as a whole.

    Args:
        path: the file; None: nothing is kept.
        run: which start of the endpoint they belong to; another start's are none of ours.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self._path = path
        self._run = run
        self._last: dict[str, object] | None = None

    def read(self, default: Decisions) -> Decisions:
        """What was decided before in this run."""
        if self._path is None or not self._path.exists():
            return default
        try:
            data = read_json(self._path)
            return Decisions(**data["decisions"]) if data["run"] == self._run else default
        except (FtrayError, OSError, KeyError, TypeError) as error:
            logger.error("earlier decisions are lost: %s", type(error).__name__)
            return default

    def write(self, decisions: Decisions) -> None:
        """Keep these, if they are new."""
        data = asdict(decisions)
        if self._path is None or data == self._last:
            return
        try:
            write_json(self._path, {"run": self._run, "decisions": data}, mode=0o600)
        except OSError as error:
            logger.error("decisions not kept: %s", error.strerror)
        else:
            self._last = data
