"""`ftray run` on CPUs begins under jemalloc, where that is to be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ftray.cluster import allocator

_SAY = """
import sys
from ftray.cluster.allocator import restart_for
restart_for(sys.argv[1:])
print("jemalloc" in open("/proc/self/maps").read(), *sys.argv[1:])
"""


@pytest.mark.skipif(
    not allocator.environment(), reason="no jemalloc to be had here, or another allocator is chosen"
)
@pytest.mark.parametrize(
    ("strategy", "override", "system", "expected"),
    [
        ("single", "", "", True),
        ({"type": "single"}, "", "", True),
        ("ddp", "", "", False),
        ("ddp", "strategy=single", "", True),
        ("single", "strategy.type=ddp", "", False),
        ("single", "", "system", False),
    ],
)
def test_it_begins_anew_where_it_trains_itself(
    tmp_path: Path, strategy: object, override: str, system: str, expected: bool
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"strategy": strategy}))
    words = [str(tmp_path / "recipe.yaml"), *([override] if override else []), "--resume"]
    command = [sys.executable, "-c", _SAY, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {allocator.SWITCH: system}
    )
    assert done.stdout.split() == [str(expected), *words], done.stderr


def test_a_chosen_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert allocator.environment() == {}
