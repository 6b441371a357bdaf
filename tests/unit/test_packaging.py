"""What is installed is pinned to the version, and one `make` has one way to install it."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line) for line in lines]
    # No `+cpu` (another machine has another build) and no path (another machine has another disk).
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    names = [_canonical(match[1]) for match in matches if match]
    assert len(set(names)) == len(names)
    return {_canonical(match[1]): match[2] for match in matches if match}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(item for extra in project["project"]["optional-dependencies"].values() for item in extra),
    ]
    names = {_canonical(re.split(r"[\[<>=;~! ]", item)[0]) for item in wanted}
    assert not names - set(_pins()), f"not in constraints.txt: {sorted(names - set(_pins()))}"


def test_what_runs_is_what_is_pinned() -> None:
    """Every installed distribution that is pinned has the pinned version."""
    from importlib.metadata import distributions

    pins = _pins()
    wrong = {
        f"{item.name} {item.version}, pinned {pin}"
        # Not `sys.path`: setuptools puts what it carries along there once it is imported.
        for item in distributions(path=[sysconfig.get_path("purelib")])
        if (pin := pins.get(_canonical(item.name))) and item.version.partition("+")[0] != pin
    }
    assert not wrong, f"run `make venv`: {wrong}"


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_a_python_that_does_not_do_is_one_line(tmp_path: Path, python: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "venv", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {python} is missing or older than 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_changed_pin_installs_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()

    def plan() -> str:
        command = ["make", "--dry-run", "venv", f"PYTHON={sys.executable}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "pip" not in plan()
    newer_s = (tmp_path / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(tmp_path / "constraints.txt", (newer_s, newer_s))
    assert "install --constraint constraints.txt" in plan()


def test_torch_is_there_when_deepspeed_is_built(tmp_path: Path) -> None:
    """deepspeed's set-up imports torch, so it is installed before, and nothing is built in isolation."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = ["make", "--dry-run", "venv", f"PYTHON={sys.executable}"]
    plan = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    tools, torch, ours = (line for line in plan if "pip" in line)
    assert tools.endswith("setuptools wheel ninja") and torch.endswith(" torch")
    assert "--no-build-isolation" in ours and ours.endswith("'.[dev]'")


def test_the_documents_are_filled_in() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    holes = {f"{page.relative_to(ROOT)}: {line}" for page in pages for line in _lines_with(page, "@@")}
    assert not holes, f"a measurement is still to be put in: {sorted(holes)}"


def _lines_with(page: Path, mark: str) -> list[str]:
    return [line for line in page.read_text("utf-8").splitlines() if mark in line]
