"""`ftray submit` and `ftray jobs` against a Ray cluster of two nodes on this machine, behind a token."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import ClusterError
from ftray.core.spec import dump, parse, replace
from tests.ray.two_nodes import HEAD, Cluster, free_ports, two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]
NODES_ALIVE = """
import ray
from ftray.cluster.ray_session import session
with session():
    print("alive:", sum(node["Alive"] for node in ray.nodes()))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


def test_a_job_file_runs_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: hello\nverb: version\nenv: {GREETING: hi}\n")
    done = cluster.ftray("submit", str(tmp_path / "job.yaml"), "--wait")
    assert done.returncode == 0, done.stderr
    job_id, *output = done.stdout.splitlines()
    assert job_id.startswith("hello-")
    assert any(line.startswith("ftray ") for line in output)
    assert cluster.ftray("jobs", "status", job_id).stdout.startswith("SUCCEEDED")
    assert job_id in cluster.ftray("jobs", "list").stdout
    assert "ftray " in cluster.ftray("jobs", "logs", job_id).stdout
    assert cluster.ftray("jobs", "stop", job_id).stdout == "it had already ended\n"


def test_a_job_sees_both_nodes_and_its_files(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftray.cluster.bundle import Bundle
    from ftray.cluster.ray_jobs import Jobs

    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # must not win over the address given
    (tmp_path / "nodes.py").write_text(NODES_ALIVE)
    jobs = Jobs(cluster.address)
    job_id = jobs.submit_command(
        "python 'a b/nodes.py' && echo canary=$RAY_AUTH_TOKEN",
        name="nodes",
        bundle=Bundle(files={"a b/nodes.py": tmp_path / "nodes.py"}),
    )
    shown: list[str] = []
    assert jobs.follow(job_id, shown.append).status == "SUCCEEDED", jobs.logs(job_id)
    assert "alive: 2\n" in "".join(shown)
    assert "".join(shown) == jobs.logs(job_id)
    request = urllib.request.Request(
        f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert cluster.token not in answer.read().decode()
    assert cluster.token not in "".join(shown)


def test_a_recipe_trains_on_the_cluster_with_what_it_names(
    cluster: Cluster,
    tmp_path: Path,
    tiny_base: Path,
    corpus: dict[str, Path],
    make_recipe: Callable[..., Recipe],
) -> None:
    project, shared = tmp_path / "project", tmp_path / "shared"
    shutil.copytree(tiny_base, project / "base")
    shutil.copy(corpus["train"], project / "rows.jsonl")
    recipe = make_recipe(
        "submitted", output_dir=str(shared), train__max_steps=2, model__model_name_or_path="base"
    )
    write_resolved(replace(recipe, "data.train", ["rows.jsonl"]), project / "recipe.yaml")
    (project / "job.yaml").write_text("name: sft\nverb: run\nconfig: recipe.yaml\narguments: [--resume]\n")

    done = cluster.ftray("submit", "job.yaml", "data.validation=[]", "--wait", cwd=project)
    assert done.returncode == 2 and "unknown key" in done.stderr  # an override is of the file that is named
    done = cluster.ftray("submit", "job.yaml", "--wait", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (shared / "submitted" / "delta" / "adapter_model.safetensors").is_file()
    wrong = cluster.ftray("submit", "recipe.yaml", "train.max_stepz=3", cwd=project)
    assert wrong.returncode == 2 and "did you mean `max_steps`?" in wrong.stderr


def test_an_endpoint_is_served_from_a_head_without_cpus_wherever_the_driver_runs(
    cluster: Cluster, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftray.cluster.ray_jobs import Jobs
    from ftray.config.job import JobConfig

    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.chdir(tmp_path)
    (port,) = free_ports(1)
    tenant = {"name": "ann", "key_sha256": hashlib.sha256(b"ann").hexdigest()}
    endpoint = {"base": str(tiny_base), "host": "0.0.0.0", "port": port, "tenants": [tenant]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(endpoint))
    job = load(JobConfig, REPOSITORY / "jobs" / "serve.yaml")
    assert job.resources.num_cpus is None  # it would keep the driver away from the head
    settings = {"config": "serve.yaml", "secrets": [], "resources": {"num_cpus": 1}}
    jobs = Jobs(cluster.address)
    job_id = jobs.submit(parse(JobConfig, dump(job) | settings))
    url = f"http://{HEAD}:{port}/v1"
    deadline_s = time.monotonic() + 90
    while f"serving at {url}" not in (logs := jobs.logs(job_id)):
        assert time.monotonic() < deadline_s and not jobs.status(job_id).done, logs
        time.sleep(0.3)
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": "Bearer ann"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer)["data"][0]["id"] == "base"
    jobs.stop(job_id)
    with pytest.raises(OSError):
        while time.monotonic() < deadline_s:
            urllib.request.urlopen(request, timeout=5).close()
            time.sleep(0.2)


def test_a_running_job_is_stopped_and_a_failed_one_says_so(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ftray.cluster.ray_jobs import Jobs

    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    jobs = Jobs(cluster.address)
    job_id = jobs.submit_command("sleep 600", name="long")
    deadline_s = time.monotonic() + 60
    while jobs.status(job_id).status != "RUNNING" and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert cluster.ftray("jobs", "stop", job_id).stdout == "stopping\n"
    assert jobs.follow(job_id, lambda text: None).status == "STOPPED"

    (tmp_path / "job.yaml").write_text("name: needs\nverb: version\nsecrets: [NOT_SET_HERE]\n")
    failed = cluster.ftray("submit", str(tmp_path / "job.yaml"), "--wait")
    assert failed.returncode == 1
    assert "NOT_SET_HERE" in failed.stdout and "FAILED" in failed.stderr


def test_the_jobs_api_wants_the_token(cluster: Cluster, tmp_path: Path) -> None:
    for header, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(
                urllib.request.Request(f"{cluster.address}/api/jobs/", headers=header), timeout=10
            )
        assert refused.value.code == status
    wrong = cluster.ftray("jobs", "list", RAY_AUTH_TOKEN="wrong")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "refuses the token" in wrong.stderr and wrong.stderr.count("\n") == 1
    none = cluster.ftray("jobs", "list", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    assert (none.returncode, none.stdout) == (2, "")
    assert "no token was sent" in none.stderr and none.stderr.count("\n") == 1


def test_mistakes_are_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.cluster.ray_jobs import Jobs

    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    unknown = cluster.ftray("jobs", "status", "nobody")
    assert unknown.returncode == 2
    assert "'nobody' is not a job" in unknown.stderr and unknown.stderr.count("\n") == 1
    with pytest.raises(ClusterError, match="Connection refused"):
        Jobs(f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ClusterError, match="not a dashboard address"):
        Jobs("ray://127.0.0.1:10001")


@pytest.mark.slow  # Ray itself tries for 20 seconds
def test_joining_without_the_token_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    code = "from ftray.cluster.ray_session import session\nwith session(): pass"
    env = {key: value for key, value in cluster.env.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"RAY_ADDRESS": cluster.gcs, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "ClusterError" in done.stderr.splitlines()[-1] and "RAY_AUTH_MODE=token" in done.stderr
