"""A session starts what it needs, keeps it on loopback and behind a token, and leaves nothing."""

import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from ftray.cluster.ray_session import session
from ftray.core.errors import ClusterError

pytestmark = pytest.mark.ray


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_a_local_cluster_is_private_and_leaves_nothing() -> None:
    import ray

    before = {process.pid for process in _children()}
    environment = dict(os.environ)
    with session(address="local", num_cpus=2, dashboard=True):
        mine = [process for process in _children() if process.pid not in before]
        listening = {
            connection.laddr.ip
            for process in mine
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        folder = Path(ray._private.worker._global_node.get_temp_dir_path()).parent
        url = ray._private.worker.global_worker.node.webui_url
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{url}/api/jobs/", timeout=10)
        assert refused.value.code == 401

        @ray.remote
        def worker() -> tuple[int, str | None]:
            return os.nice(0), os.environ.get("TOKENIZERS_PARALLELISM")

        assert ray.get(worker.remote()) == (os.nice(0), "false")
        with session(num_cpus=1):
            assert ray.cluster_resources()["CPU"] == 2
        assert ray.is_initialized()
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(mine, timeout=5)
    assert mine and not alive
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert not folder.exists()
    for variables in (environment, os.environ):
        variables.pop("PYTHONBREAKPOINT", None)  # set by Ray for its debugger, once a process
    assert dict(os.environ) == environment


def test_what_killed_sessions_left_is_swept_after_a_day(tmp_path: Path) -> None:
    from ftray.cluster.ray_session import _sweep

    alive, dead = os.getpid(), 2**22 + 1  # Linux gives no process a number above 2**22
    day_old_s = time.time() - 25 * 3600
    for name in (f"ftray-{alive}-a", f"ftray-{dead}-b", "ftray-x-c"):
        (tmp_path / name / "ray").mkdir(parents=True)
        os.utime(tmp_path / name, (day_old_s, day_old_s))
    (tmp_path / f"ftray-{dead}-new").mkdir()
    _sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"ftray-{alive}-a",
        "ftray-x-c",
        f"ftray-{dead}-new",
    }


def test_the_token_is_for_its_owner_only(tmp_path: Path) -> None:
    code = "from ftray.cluster.ray_session import session\nwith session(address='local', num_cpus=1): pass"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment["HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ClusterError, match="not a cluster"), session(address="http://127.0.0.1:8265"):
        pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ClusterError) as raised, session(address=address):
        pass
    assert address in str(raised.value) and "\n" not in str(raised.value)


def test_a_worker_the_raylet_does_not_know_of_is_ended_too() -> None:
    with session(address="local", num_cpus=1):
        marked = os.environ | {"RAY_RAYLET_PID": "1"}
        lost = subprocess.Popen(["sleep", "300"], env=marked)
        other = subprocess.Popen(["sleep", "300"])
    try:
        assert lost.wait(timeout=5) < 0
        assert other.poll() is None, "what is not Ray's is left alone"
    finally:
        other.kill()
        other.wait()
