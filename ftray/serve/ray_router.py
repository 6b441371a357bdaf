"""Delta affinity as a request router of Ray Serve."""

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
        request = pending_request.args[0] if pending_request and pending_request.args else None
        delta = request.delta if isinstance(request, Request) else None
        return [[replicas[name] for name in rank] for rank in preferred(delta, queues)]
