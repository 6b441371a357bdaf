"""Jobs on a Ray cluster through its Jobs API: submit, list, watch, stop.

The cluster's token goes into a request header. It is never on a command line nor in a job's environment,
where everyone who may list jobs could read it.
"""

import asyncio
import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ftray.cluster.bundle import Bundle, collect, command_line
from ftray.cluster.reach import reach
from ftray.config.job import JobConfig, JobResources
from ftray.core.errors import ClusterError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_POLL_S = 1.0
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it. `status` is Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: str
    status: str
    command: str
    message: str
    started_s: float | None
    """Seconds since 1970, or None before the start."""

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return JobStatus(self.status).is_terminal()


class Jobs:
    """The jobs of one cluster.

    Args:
        address: the dashboard's address, `http://host:8265`; None: `RAY_API_SERVER_ADDRESS`, or this machine.

    Raises:
        ClusterError: if nobody answers or the token is refused; every method does.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get(_ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        self.address = address.rstrip("/") if "://" in address else f"http://{address}"
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(f"{address!r} is not a dashboard address; write it as {DEFAULT_ADDRESS}")
        reach(self.address, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        token = read_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with self._told(), _only_address(self.address):
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, job: JobConfig) -> str:
        """Send a job's files and start it; returns its id."""
        return self.submit_command(
            command_line(job), name=job.name, bundle=collect(job), env=job.env, resources=job.resources
        )

    def submit_command(
        self,
        command: str,
        *,
        name: str,
        bundle: Bundle | None = None,
        env: dict[str, str] | None = None,
        resources: JobResources | None = None,
    ) -> str:
        """Start a shell command in a folder of the bundle's files; returns the job's id."""
        resources = resources or JobResources()
        job_id = f"{name}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory(prefix="ftray-job-") as folder, self._told():
            runtime_env: dict[str, Any] = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"} | (env or {})}
            if bundle and bundle.files:
                bundle.copy_to(Path(folder))
                runtime_env["working_dir"] = folder
            self._client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env=runtime_env,
                entrypoint_num_cpus=resources.num_cpus,
                entrypoint_num_gpus=resources.num_gpus,
                entrypoint_memory=resources.memory_bytes,
                entrypoint_resources=resources.custom or None,
            )
        return job_id

    def list(self) -> list[Job]:
        """Submitted jobs, the newest first."""
        with self._told():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started_s or float("inf"), reverse=True)

    def status(self, job_id: str) -> Job:
        """One job."""
        with self._told(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """What a job has printed so far."""
        with self._told(job_id):
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; True if it was running."""
        with self._told(job_id):
            return self._client.stop_job(job_id)

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Show a job's output as it comes, until the job ends; returns the ended job."""
        shown = 0
        while True:
            job = self.status(job_id)
            if job.status != JobStatus.PENDING:
                with self._told(job_id):
                    shown = asyncio.run(self._tail(job_id, shown, show))
            if job.done:
                return job
            time.sleep(_POLL_S)

    async def _tail(self, job_id: str, skip: int, show: Callable[[str], None]) -> int:
        """Stream the output from character `skip` on; returns how many characters have been shown."""
        position = 0
        async for text in self._client.tail_job_logs(job_id):
            if new := text[max(0, skip - position) :]:
                show(new)
            position += len(text)
        return max(position, skip)

    @contextlib.contextmanager
    def _told(self, job_id: str = "") -> Iterator[None]:
        """Turn what the Jobs API answers into one line."""
        try:
            yield
        except AuthenticationError as error:
            what = "no token was sent" if "required" in str(error) else "it refuses the token"
            raise ClusterError(
                f"{self.address}: {what}; set RAY_AUTH_TOKEN_PATH to a file with its token"
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise ClusterError(
                f"{self.address}: {_line(error)}; check the address and that the cluster runs"
            ) from None
        except (RuntimeError, ValueError) as error:
            if job_id and ("404" in str(error) or "does not exist" in str(error)):
                raise ClusterError(
                    f"{job_id!r} is not a job of {self.address}; see `ftray jobs list`"
                ) from None
            raise ClusterError(f"{self.address}: {_line(error)}") from error


def read_token() -> str | None:
    """The token, from where Ray itself looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text("utf-8").strip() or None
    except OSError as error:
        if named:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {named!r} cannot be read ({error.strerror})") from None
        return None


def _job(details: JobDetails) -> Job:
    started_s = details.start_time / 1000 if details.start_time else None
    return Job(
        id=details.submission_id or details.job_id or "",
        status=JobStatus(details.status).value,
        command=details.entrypoint,
        message=details.message or "",
        started_s=started_s,
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray's client lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS win over the address it is given."""
    before = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = before
