"""A Ray cluster of two nodes on this machine, behind a token."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
# Two addresses of the loopback interface: two nodes with their own addresses, reachable from here only.
HEAD, SECOND = "127.0.0.2", "127.0.0.3"


@dataclass(frozen=True)
class Cluster:
    """The running cluster and the environment of a user who may use it."""

    address: str
    gcs: str
    token: str
    env: dict[str, str]
    folder: Path

    @contextlib.contextmanager
    def node(self, address: str, num_cpus: int) -> Iterator[subprocess.Popen[bytes]]:
        """One more node, at another address of the loopback interface, until the block ends."""
        first, second, third = free_ports(3)
        started = _start(
            self.folder,
            self.env,
            f"--address={self.gcs}",
            f"--num-cpus={num_cpus}",
            f"--node-ip-address={address}",
            *_agent_ports(first, second, third),
        )
        try:
            yield started
        finally:
            _end([started])

    def ftray(self, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ftray"), *words, "--address", self.address]
        return subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=120
        )


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _start(folder: Path, env: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    command = [
        str(BIN / "ray"),
        "start",
        "--block",
        "--object-store-memory=100000000",
        *options,
    ]
    log = (folder / f"start-{len(list(folder.glob('start-*')))}.log").open("wb")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def _agent_ports(listen: int, grpc: int, runtime_env: int) -> tuple[str, ...]:
    return (
        f"--dashboard-agent-listen-port={listen}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--runtime-env-agent-port={runtime_env}",
    )


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    mine = []
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            mine += psutil.Process(process.pid).children(recursive=True)
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    _, alive = psutil.wait_procs(mine, timeout=10)
    for process in [*alive, *started]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()


def _wait_for(url: str, token: str, nodes: int) -> None:
    request = urllib.request.Request(
        f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            summary = json.load(answer)["data"]["summary"]
            if sum(node["raylet"].get("state") == "ALIVE" for node in summary) == nodes:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no {nodes} nodes at {url}")


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Run a head without CPUs and a worker with two, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="ftj-", dir="/tmp"))
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    gcs, dashboard, *agents = free_ports(8)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    ports = [_agent_ports(*agents[:3]), _agent_ports(*agents[3:])]
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(
            _start(
                folder,
                env,
                "--head",
                "--num-cpus=0",  # as usual: work goes to the workers
                f"--node-ip-address={HEAD}",
                f"--port={gcs}",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--temp-dir={folder}/ray",
                *ports[0],
            )
        )
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(address, token_file.read_text(), 1)
        started.append(
            _start(
                folder,
                env,
                f"--address={HEAD}:{gcs}",
                "--num-cpus=2",
                f"--node-ip-address={SECOND}",
                *ports[1],
            )
        )
        _wait_for(address, token_file.read_text(), 2)
        yield Cluster(address, f"{HEAD}:{gcs}", token_file.read_text(), env, folder)
    finally:
        _end(started)
        shutil.rmtree(folder, ignore_errors=True)
