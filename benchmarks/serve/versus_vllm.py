"""The same requests against vLLM, in the Python that `FTRAY_VLLM_PYTHON` names."""

import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.serve.arms import interleave, ours
from benchmarks.serve.sections import Figures, Section
from benchmarks.serve.setup import RANK, Prompt

_ROOT = Path(__file__).parents[2]
_REQUESTS = 32


class Peer:
    """A process that holds vLLM; its processor time is not this one's."""

    def __init__(self, process: "subprocess.Popen[str]", prompts: Sequence[Prompt], new_tokens: int) -> None:
        self._process = process
        self._prompts, self._new_tokens = prompts, new_tokens

    def work(self) -> int:
        """Answer everything once."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        assert self._line() == str(len(self._prompts) * self._new_tokens)
        return sum(len(prompt.ids) + self._new_tokens for prompt in self._prompts)

    def cpu_s(self) -> float:
        """Processor seconds so far of vLLM and what it started."""
        root = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return sum(t.user + t.system + t.children_user + t.children_system for t in times)

    def wait_ready(self) -> bool:
        """False if it could not start."""
        return self._line() == "ready"

    def _line(self) -> str:
        """Its next line that is ours: libraries print too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (word := line.strip()) == "ready" or word.isdigit():
                return word
        return ""


@contextlib.contextmanager
def _peer(
    section: Section, shape: str, adapters: Mapping[str, Path], prompts: Sequence[Prompt], eager: bool
) -> Iterator[Peer]:
    new_tokens = section.new_tokens[shape]
    job = section.setup.folder / f"vllm-{shape}-{len(adapters)}.json"
    settings: dict[str, Any] = {
        "base": str(section.setup.base(shape)),
        "dtype": section.setup.dtype,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "rank": RANK,
        "max_length": 512,
        "new_tokens": new_tokens,
        "prompts": [[prompt.ids, prompt.adapter] for prompt in prompts],
        "eager": eager,
    }
    job.write_text(json.dumps(settings))
    threads = str(torch.get_num_threads())
    environment = os.environ | {
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [os.environ["FTRAY_VLLM_PYTHON"], "-m", "benchmarks.serve.vllm_peer", str(job)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        job.with_suffix(".log").open("w") as log,
        subprocess.Popen(command, env=environment, cwd=_ROOT, stderr=log, **pipes) as process,
    ):
        try:
            yield Peer(process, prompts, new_tokens)
        finally:
            process.kill()


def vllm(section: Section, shape: str) -> Figures:
    """32 requests at once over the base (vLLM then without LoRA) and under 8 adapters."""
    if "FTRAY_VLLM_PYTHON" not in os.environ:
        return {"vllm": "FTRAY_VLLM_PYTHON names no Python that has vLLM"}
    names = list(section.setup.adapters(shape, 8))
    prompts = {
        "base": section.setup.prompts(_REQUESTS, [None]),
        "8": section.setup.prompts(_REQUESTS, [*names]),
    }
    engine = section.engine(shape, 8)
    arms = {name: ours(engine, mine, section.new_tokens[shape]) for name, mine in prompts.items()}
    clocks, figures = {}, Figures()
    with contextlib.ExitStack() as stack:
        for name, mine in prompts.items():
            adapters = section.setup.adapters(shape, 8) if name == "8" else {}
            for eager in (False, True):  # compiled where that works
                peer = stack.enter_context(_peer(section, shape, adapters, mine, eager))
                if peer.wait_ready():
                    break
            else:
                return {"vllm": f"did not start; see {section.setup.folder}"}
            figures[f"vllm_{name}_compiled"] = not eager
            arms[f"vllm_{name}"], clocks[f"vllm_{name}"] = peer.work, peer.cpu_s
        rates = interleave(arms, section.rounds, clocks)
    for name in prompts:
        both = list(zip(rates[name], rates[f"vllm_{name}"], strict=True))
        figures |= {
            f"ratio_vs_vllm_cpu_{name}": statistics.median(a.per_cpu_s / b.per_cpu_s for a, b in both),
            f"ratio_vs_vllm_cpu_{name}_wall": statistics.median(a.per_s / b.per_s for a, b in both),
            f"tokens_per_cpu_s_vllm_{name}": statistics.median(b.per_cpu_s for _, b in both),
        }
    return figures
