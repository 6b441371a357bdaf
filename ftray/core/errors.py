"""Errors a user can cause, each one line that names the field or file, the value and the remedy.

    FtrayError(ValueError)
    ├── ConfigError      a recipe, a space, a serve file, an override
    ├── DataError        a corpus, a shard, a row
    ├── ModelError       a base folder, a tokenizer
    ├── DeltaError       a delta folder, a delta of another base
    ├── RegistryError    a name, a version, an alias
    ├── CheckpointError  a damaged or foreign checkpoint
    ├── TrainError       a run that cannot go on (not finite, hung)
    │   └── GroupFailed  a worker group that died, hung or found no room: another attempt may go better
    ├── RunStopped       a run that was asked to end early; carries the signal, if it was one
    ├── TuneError        a search that cannot go on
    ├── ClusterError     a cluster that cannot be reached or refuses us
    └── RequestError     an inference request; carries the HTTP status and OpenAI's code

Invariants of our own code are `assert`s, never these.
"""


class FtrayError(ValueError):
    """A mistake the user can mend; the command line prints it as one line and exits with 2."""


class ConfigError(FtrayError):
    """A value in a recipe or another configuration file."""


class DataError(FtrayError):
    """A corpus, a shard or a row."""


class ModelError(FtrayError):
    """A base model folder or a tokenizer."""


class DeltaError(FtrayError):
    """A delta folder that is damaged or belongs to another base."""


class RegistryError(FtrayError):
    """A name, version or alias in the registry."""


class CheckpointError(FtrayError):
    """A checkpoint that is damaged or belongs to another run."""


class TrainError(FtrayError):
    """A training run that cannot go on."""


class GroupFailed(TrainError):
    """A worker group that failed though no worker met a user's mistake: another attempt may go better."""


class RunStopped(FtrayError):
    """A training run that ended early because it was asked to; a checkpoint holds every step it has done.

    `signum` is the number of the signal that asked, None if something else did.
    """

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple[object, ...]:
        return (RunStopped, (str(self), self.signum))


class TuneError(FtrayError):
    """A search that cannot go on."""


class ClusterError(FtrayError):
    """A Ray cluster that cannot be reached or refuses the request."""


class RequestError(FtrayError):
    """An inference request that cannot be answered.

    `status` is the HTTP status, `code` the machine-readable code of OpenAI's error object, `param` the request
    field it speaks of, and `retry_after_s` when a 429 or 503 is worth another try.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their positional arguments; ours are keyword-only and must cross processes.
        return (_rebuild_request_error, (str(self), self.status, self.code, self.param, self.retry_after_s))


def _rebuild_request_error(
    message: str, status: int, code: str, param: str | None, retry_after_s: int
) -> RequestError:
    return RequestError(message, status=status, code=code, param=param, retry_after_s=retry_after_s)
