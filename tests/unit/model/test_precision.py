"""What a process keeps for its products in bfloat16."""

import os
import subprocess
import sys

import pytest
import torch

from ftray.model.precision import KERNEL_BYTES

_GROWTH = """
import resource, sys
from pathlib import Path
import torch
from ftray.model.precision import autocast

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
left, right = torch.ones(700, 16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16)
with autocast(True), torch.no_grad():
    left[:1] @ right
    before = resident()
    for length in range(2, 700):
        left[:length] @ right
print(resident() - before)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)
def test_rows_of_ever_new_lengths_do_not_grow_a_process() -> None:
    """Without a bound 698 shapes take five times as much; who says how many kernels to keep is heard."""
    bounded = _grown({})
    unbounded = _grown({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"})
    # The library's own pages and what an allocator keeps come on top of both.
    assert bounded < 2.5 * KERNEL_BYTES < unbounded - 2 * KERNEL_BYTES, (bounded, unbounded)


def _grown(chosen: dict[str, str]) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    command = [sys.executable, "-c", _GROWTH]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | chosen)
    return int(done.stdout)
