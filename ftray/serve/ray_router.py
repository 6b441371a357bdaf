"""Delta affinity as a request router of Ray Serve."""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from ftray.engine.api import Request
from ftray.serve.affinity import preferred


class AffinityRouter(FIFOMixin, RequestRouter):
    """Sends requests under one delta to one replica while that is not much busier than the others."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`."""
        replicas = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        queues = {
            name: self.replica_queue_len_cache.get(replica.replica_id) for name, replica in replicas.items()
        }
        delta, attempt = _asked(pending_request.args if pending_request else ())
        return [[replicas[name] for name in rank] for rank in preferred(delta, queues, attempt)]


def _asked(arguments: Sequence[Any]) -> tuple[str | None, int]:
    """The delta of a call of `generate`, and how often it was tried before; of any other call nothing."""
    match arguments:
        case [Request(delta=delta), int(attempt)]:
            return delta, attempt
    return None, 0
