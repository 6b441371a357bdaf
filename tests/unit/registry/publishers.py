"""Processes that publish at once."""

import multiprocessing
from pathlib import Path
from typing import Any

from ftray.registry.registry import Registry

NUM_PUBLISHERS = 8


def _publish_many(root: Path | str, delta: Path, count: int, barrier: Any, results: Any) -> None:
    registry = Registry(root)
    barrier.wait()
    results.put([registry.publish(delta, "tone").version for _ in range(count)])


def publish_at_once(root: Path | str, delta: Path, per_publisher: int) -> list[int]:
    """Versions of `tone` after several processes published at once: each saw its own rise, none is missing."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(NUM_PUBLISHERS), context.Queue()
    arguments = (root, delta, per_publisher, barrier, results)
    processes = [context.Process(target=_publish_many, args=arguments) for _ in range(NUM_PUBLISHERS)]
    for process in processes:
        process.start()
    versions = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert all(own == sorted(own) for own in versions)
    everything = sorted(version for own in versions for version in own)
    assert everything == list(range(1, NUM_PUBLISHERS * per_publisher + 1))
    return everything
