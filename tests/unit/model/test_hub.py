"""A base named by its Hub id: fetched once a node whatever the number of processes, later found without the Hub."""

import collections
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ftray.testing import tiny

COMMIT = "c" * 40
REPO = "acme/tiny"


class Hub(http.server.BaseHTTPRequestHandler):
    """What `snapshot_download` asks of the Hub, over one folder; a large file takes its time."""

    folder: ClassVar[Path]
    requests: ClassVar[collections.Counter[str]]

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            names = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in names.items()]
            siblings = [{"rfilename": name} for name in names]
            about = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(tree if "/tree/" in path else about).encode())
            return
        file = self.folder / path.partition("/resolve/")[2].partition("/")[2]
        if not path.startswith(f"/{REPO}/resolve/") or not file.is_file():
            self.send_error(404)
            return
        type(self).requests[f"{self.command} {file.relative_to(self.folder)}"] += 1
        if self.command == "GET" and file.suffix == ".safetensors":
            time.sleep(1.0)  # the other process arrives meanwhile
        self._send(file.read_bytes())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    folder = tiny.tiny_base(tmp_path / "repo")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"and again")
    Hub.folder, Hub.requests = folder, collections.Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD = f"from ftray.model.build import load_model; print(load_model({REPO!r}).num_parameters())"


def load(home: Path, endpoint: str, offline: bool = False) -> subprocess.Popen[str]:
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", LOAD], env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_two_processes_fetch_the_weights_once(hub: str, tmp_path: Path) -> None:
    both = [load(tmp_path / "home", hub) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] and int(results[0][0]) > 1000
    gets = {key.removeprefix("GET "): n for key, n in Hub.requests.items() if key.startswith("GET ")}
    assert gets["model.safetensors"] == 1 and gets["config.json"] == 1
    assert not any("consolidated" in name or "/" in name for name in gets), gets
    before = Hub.requests.copy()
    again = load(tmp_path / "home", hub, offline=True)
    out, error = again.communicate(timeout=120)
    assert out == results[0][0], error
    assert Hub.requests == before
