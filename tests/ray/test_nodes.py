"""Nodes that join a running cluster and leave it: the group grows and shrinks, and the curve is one process's."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.core.fs import read_json
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.ray.two_nodes import BIN, Cluster, two_nodes
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

REPOSITORY = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 2000, 50
"""Checkpoints of the interval are rare here: what is committed in between was committed at a notice."""
NODES = """
import ray
ray.init("{gcs}", log_to_driver=False)
print(*(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == "{address}"))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


def until(met: Callable[[], bool], what: str, wait_s: float = 90.0) -> None:
    deadline = time.monotonic() + wait_s
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def world(folder: Path) -> int:
    """Workers of the group that trains now: processes that said within two seconds what they do."""
    with contextlib.suppress(OSError, ValueError):
        found = [read_json(path) for path in folder.glob("progress/rank-*.json")]
        newest = max((record["time"] for record in found), default=0.0)
        return sum(record["time"] > max(newest - 2.0, time.time() - 5.0) for record in found)
    return 0


def commits(folder: Path) -> dict[int, int]:
    """Workers that took each committed checkpoint, by its step."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("checkpoints/step-*/manifest.json")]
    return {manifest["state"]["step"]: manifest["world"] for manifest in manifests}


@contextlib.contextmanager
def running(cluster: Cluster, recipe: Recipe, folder: Path) -> Iterator[Path]:
    """The run as a job of the cluster; its folder."""
    write_resolved(recipe, folder / "recipe.yaml")
    job = {"name": "elastic", "verb": "run", "config": "recipe.yaml", "env": {"PYTHONPATH": str(REPOSITORY)}}
    (folder / "job.yaml").write_text(json.dumps(job))
    done = cluster.ftray("submit", "job.yaml", cwd=folder, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.split()[0]
    try:
        yield Path(recipe.output_dir) / recipe.name
    except BaseException:
        print(cluster.ftray("jobs", "logs", job_id).stdout[-5000:])
        for path in sorted(folder.rglob("progress/*")):
            print(path.read_text())
        raise
    finally:
        cluster.ftray("jobs", "stop", job_id)


def preempt(cluster: Cluster, address: str, notice_s: int) -> None:
    """Tell Ray that a node is to go, as a cloud's notice to a spot node is told."""
    python = [str(BIN / "python"), "-c", NODES.format(gcs=cluster.gcs, address=address)]
    node_id = subprocess.run(
        python, env=cluster.env, capture_output=True, text=True, check=True
    ).stdout.strip()
    command = [str(BIN / "ray"), "drain-node", f"--address={cluster.gcs}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    command += [f"--deadline-remaining-seconds={notice_s}"]
    subprocess.run(command, env=cluster.env, check=True, capture_output=True)


def test_nodes_come_and_go(cluster: Cluster, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two workers, three, two at a notice of preemption, three, and two when a node is told to end."""
    slow = {"type": "tests.slow_objective:Slow", "pause_s": 0.15}
    settings = {"data__validation": [], "train__max_steps": STEPS, "train__global_batch_size": 12}
    settings |= {"optim__learning_rate": 1e-4}
    recipe = make_recipe(
        "elastic",
        strategy={"type": "ddp", "num_workers": [1, 4], "cpus_per_worker": 1},
        objective=slow,
        train__save_steps=SAVE_STEPS,
        train__save_total_limit=1000,
        train__elastic_interval_s=3,
        **settings,
    )
    with running(cluster, recipe, tmp_path) as folder:
        until(lambda: world(folder) == 2 and len(losses(folder)) > 3, "two workers")
        with cluster.node("127.0.0.4", 1) as node:
            until(lambda: world(folder) == 3, "a third worker")
            time.sleep(3)
            done, began = max(losses(folder)), time.monotonic()
            preempt(cluster, "127.0.0.4", notice_s=20)
            until(lambda: any(step >= done for step in commits(folder)), "a checkpoint at the notice", 20)
            print(f"committed {time.monotonic() - began:.1f} s after the notice")
            time.sleep(max(0.0, began + 20 - time.monotonic()))
            os.killpg(node.pid, signal.SIGKILL)  # the cloud keeps its word
            until(lambda: world(folder) == 2, "two workers again")
            print(f"two workers again after {time.monotonic() - began:.1f} s")
        with cluster.node("127.0.0.5", 1) as node:
            until(lambda: world(folder) == 3, "a third worker again")
            time.sleep(3)
            done = max(losses(folder))
            node.send_signal(signal.SIGTERM)  # as when a pod is deleted: `ray start` drains its node
            until(lambda: any(step >= done for step in commits(folder)), "a checkpoint at SIGTERM", 30)
            until(lambda: world(folder) == 2 and max(losses(folder)) > done + 3, "two workers at last")
        (folder / "stop").write_text("the test is over")
        until(lambda: (folder / "stopped.json").exists(), "the end")
        (last,) = read_json(folder / "stopped.json")["steps"]
    print(f"workers by committed step: {dict(sorted(commits(folder).items()))}")
    assert set(commits(folder).values()) >= {2, 3}
    reference = make_recipe("reference", objective={**slow, "pause_s": 0.0}, **settings)
    train(reference, LocalIO(tmp_path / "reference"), stop_at=last)
    assert losses(folder) == pytest.approx(losses(tmp_path / "reference"), rel=1e-5)
    assert sorted(losses(folder)) == list(range(1, last + 1)), "no step lost, none twice"
