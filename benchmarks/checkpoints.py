"""How long a step waits for a checkpoint: `python -m benchmarks.checkpoints --json`.

The same full fine-tuning state (parameters and AdamW's two moments) is committed beside the steps and with waiting
for the disk, in turn. Between two asynchronous ones the disk is left to finish, as it does in a run whose
checkpoints are further apart than one takes to write.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ftray.strategy.single import Single
from ftray.train.checkpoint import Checkpoints, State


def measure_stall(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    folder: Path,
    repeats: int = 5,
) -> dict[str, float]:
    """Seconds that a step waits for its checkpoint, the median of `repeats` each.

    Args:
        parameters: what trains, by name.
        optimizers: of these parameters, after a step.
        folder: on the disk to measure.
        repeats: checkpoints of each kind.

    Returns:
        `checkpoint_stall_s` beside the steps, `checkpoint_sync_stall_s` with waiting, their ratio and
        `checkpoint_bytes`.
    """
    strategy, checkpoints = Single(), Checkpoints(folder, {}, 1, "measure")
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1, 2 * repeats + 3):  # the first of each warms up
        wait = step % 2 == 0
        start = time.perf_counter()
        snapshot = strategy.snapshot(parameters, optimizers, copy=not wait)
        checkpoints.commit(State(step=step), snapshot, 1, wait=wait)
        times[wait].append(time.perf_counter() - start)
        checkpoints.finish()
    (last,) = folder.glob("step-*")
    beside, waiting = (statistics.median(times[wait][1:]) for wait in (False, True))
    return {
        "checkpoint_stall_s": beside,
        "checkpoint_sync_stall_s": waiting,
        "checkpoint_stall_ratio": beside / waiting,
        "checkpoint_bytes": float(sum(path.stat().st_size for path in last.iterdir())),
    }


def adamw_state(num_parameters: int) -> tuple[dict[str, torch.nn.Parameter], list[torch.optim.Optimizer]]:
    """That many parameters in matrices of a million, after one step of AdamW."""
    count = max(1, num_parameters >> 20)
    parameters = {f"w{i}": torch.nn.Parameter(torch.randn(1024, 1024)) for i in range(count)}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return parameters, [optimizer]


def main() -> None:
    """Measure 25M parameters on the disk of the temporary folder, or of `--folder`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--parameters", type=int, default=25 << 20)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure_stall(*adamw_state(options.parameters), Path(folder))
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
