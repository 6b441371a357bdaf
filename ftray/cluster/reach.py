"""Is anyone there? Asked before Ray's clients are, which wait for minutes."""

import socket

from ftray.core.errors import ClusterError

_TIMEOUT_S = 10.0


def reach(address: str, host: str, port: int) -> None:
    """Open and close a connection. Raises `ClusterError` (one line) if nobody answers."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(f"{address}: {reason}; check the address and that the cluster runs") from None
