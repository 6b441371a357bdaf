"""Speed and memory of training on one GPU: `python -m benchmarks.gpu --json`.

Random weights: an 8B-shaped model for LoRA and a 3B-shaped one for full fine-tuning (whose weights, gradients and
moments in float32 take 16 bytes a parameter). Each arm has a process of its own and its fastest settings out of a
sweep of compilation and activation checkpointing; one that does not fit is reported as such.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

_WARM = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One arm with one choice of settings, in this process."""
    import torch

    from benchmarks.gpu.loops import ARMS
    from benchmarks.gpu.shapes import row, step_flops

    cuda = options.device == "cuda"
    model, step = ARMS[options.arm](
        options.shape,
        lora=options.lora,
        device=options.device,
        compiled=options.compiled,
        checkpointing=options.checkpointing,
    )
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    times, flops, losses = [], [], []
    for number in range(_WARM + options.steps):
        batch = row(options.shape, options.tokens, number, options.device)
        start = time.perf_counter()
        losses.append(step(batch))  # a number on the host, so the device has done
        times.append(time.perf_counter() - start)
        flops.append(step_flops(options.shape, batch, parameters))
    step_s = statistics.median(times[_WARM:])
    figures: dict[str, Any] = {
        "tokens_per_s": round(options.tokens / step_s),
        "step_s": round(step_s, 4),
        "tflops": round(statistics.median(flops[_WARM:]) / step_s / 1e12, 2),
        "losses": [round(loss, 4) for loss in losses],
    }
    if cuda:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def matmul_tflops(device: str) -> float:
    """The device's own bfloat16 matrix product, the best of ten."""
    import torch

    size = 8192 if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def best_of(options: argparse.Namespace, arm: str, shape: str, lora: bool) -> dict[str, Any]:
    """The fastest settings of an arm, each tried in a process of its own."""
    tried: dict[str, Any] = {}
    for compiled, checkpointing in itertools.product((False, True), repeat=2):
        command = [sys.executable, "-m", "benchmarks.gpu", "--arm", arm, "--shape", shape, "--json"]
        command += [
            "--device",
            options.device,
            "--tokens",
            str(options.tokens),
            "--steps",
            str(options.steps),
        ]
        flags = {"--lora": lora, "--compiled": compiled, "--checkpointing": checkpointing}
        command += [flag for flag, is_set in flags.items() if is_set]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        name = f"compiled={compiled} checkpointing={checkpointing}"
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            tried[name] = json.loads(lines[-1])
        else:
            tried[name] = {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    worked = {name: figures for name, figures in tried.items() if "step_s" in figures}
    if not worked:
        return {"tried": tried}
    name = min(worked, key=lambda key: worked[key]["step_s"])
    return {"settings": name, **worked[name], "tried": tried}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All arms, and the ratios of the best of each."""
    import torch

    peak = matmul_tflops(options.device)
    figures: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tokens": options.tokens,
        "matmul_peak_tflops_bf16": round(peak, 1),
    }
    small = options.shape == "tiny"
    for what, shape, lora in (("lora", options.shape, True), ("full", "tiny" if small else "3b", False)):
        found = {arm: best_of(options, arm, shape, lora) for arm in ("ours", "hf")}
        for arm, best in found.items():
            if "tflops" in best and not lora:  # a frozen base needs a third less
                best["mfu"] = round(best["tflops"] / peak, 3)
            figures[f"{what}_{arm}"] = best | {"shape": shape}
        if all("step_s" in best for best in found.values()):
            figures[f"{what}_ratio_vs_hf"] = round(found["hf"]["step_s"] / found["ours"]["step_s"], 3)
    return figures


def main() -> None:
    """Print the figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", default="8b", choices=["8b", "3b", "tiny"])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step, one padding-free row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--arm", choices=["ours", "hf"], help="one arm only, in this process")
    parser.add_argument("--lora", action="store_true", help="of that arm")
    parser.add_argument("--compiled", action="store_true", help="of that arm")
    parser.add_argument("--checkpointing", action="store_true", help="of that arm")
    parser.add_argument("--json", action="store_true", help="one JSON line only (it is always the last)")
    options = parser.parse_args()
    print(json.dumps(measure(options) if options.arm else compare(options)))


if __name__ == "__main__":
    main()
