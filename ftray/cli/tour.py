"""The stages of the quickstart, in order. Nothing here trains, searches or serves: it calls what does."""

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ftray.cli.ask import ask_all, curl_lines
from ftray.cli.publish import MEASURING, published_lines
from ftray.cli.screen import bar, console, out, run_bars
from ftray.config.evaluate import EvalConfig
from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.serve import ServeConfig
from ftray.config.tune import TuneConfig
from ftray.core.errors import FtrayError, TuneError
from ftray.core.fs import digest_file, digest_json, read_json, write_json
from ftray.core.spec import replace
from ftray.data.read import counts_line

TASKS = ("raises", "describe")
TENANTS = {"raises": "acme", "describe": "globex"}


class Tour:
    """One walk from text to endpoint.

    Args:
        examples: folder of the YAML files, which say where everything is made, and of the harvest script.
    """

    def __init__(self, examples: Path) -> None:
        self.examples = examples
        self.folder = Path(load(Recipe, examples / "base.yaml").output_dir)
        self._rows: list[tuple[str, float, str, str]] = []
        self._deltas: dict[str, Path] = {}
        self._reports: dict[str, Any] = {}
        self._lineage: dict[str, dict[str, Any]] = {}

    def run(self, keep_serving: bool) -> None:
        """All stages; raises `FtrayError` if a tuned delta does not beat what it has to beat."""
        self._clear()
        self._stage("corpus", self._corpus)
        self._stage("base", self._base)
        with contextlib.ExitStack() as stack:
            self._stage("ray", functools.partial(self._start_ray, stack))
            for task in TASKS:
                self._stage(f"fine-tune {task}", functools.partial(self._fine_tune, task))
            self._stage("search", self._search)
            for task in TASKS:
                self._stage(f"evaluate {task}", functools.partial(self._evaluate, task))
            self._stage("publish", self._publish)
            self._serve(keep_serving)
        self._summary()

    def _stage(self, name: str, work: Callable[[], tuple[str, Path | str]]) -> None:
        console.rule(f"[bold]{name}", align="left")
        start = time.monotonic()
        made, where = work()
        seconds = time.monotonic() - start
        self._rows.append((name, seconds, made, str(where)))
        console.print(f"{made}  ({seconds:.0f} s)", highlight=False, markup=False)

    def _clear(self) -> None:
        """Remove what an earlier walk made, but for the corpus, the base and the registry."""
        for name in (*TASKS, "search"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @property
    def _key(self) -> str:
        """What corpus and base depend on: this Python's library, the harvest script, the base's recipe."""
        files = {name: digest_file(self.examples / name) for name in ("harvest.py", "base.yaml")}
        return digest_json({"python": platform.python_version(), **files})

    def _is_cached(self) -> bool:
        """True if corpus and base of this key are there."""
        stamp = self.folder / "base.json"
        made = (self.folder / "base/delta/ftray_delta.json", self.folder / "corpus/pretrain.jsonl", stamp)
        return all(file.is_file() for file in made) and read_json(stamp).get("key") == self._key

    def _corpus(self) -> tuple[str, Path]:
        corpus = self.folder / "corpus"
        if not self._is_cached():
            (self.folder / "base.json").unlink(missing_ok=True)
            for name in ("corpus", "tokenizer", "base"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            with bar("harvest the standard library"):
                command = [sys.executable, str(self.examples / "harvest.py"), "--out", str(corpus)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = sum(1 for file in corpus.rglob("*.jsonl") for _ in file.open("rb"))
        return f"{rows:,} rows of Python's own library{self._cached}", corpus

    @property
    def _cached(self) -> str:
        return " (cached)" if self._is_cached() else ""

    def _base(self) -> tuple[str, Path]:
        from ftray.data.train_tokenizer import train_tokenizer
        from ftray.train.ray_launch import launch

        recipe = load(Recipe, self.examples / "base.yaml")
        model = self.folder / "base" / "delta"
        cached = self._cached
        if not cached:
            with bar("train the tokenizer") as progress:
                train_tokenizer(
                    recipe.data.train,
                    Path(recipe.model.tokenizer),
                    recipe.model.config["vocab_size"],
                    progress,
                )
            with run_bars("the base") as (on_prepare, on_record):
                result = launch(recipe, on_prepare=on_prepare, on_record=on_record)
            stamp = {"key": self._key, "metrics": result.metrics, "bf16": result.bf16}
            write_json(self.folder / "base.json", stamp)
        loss = read_json(self.folder / "base.json")["metrics"]["eval_loss"]
        return f"a Llama trained from scratch, held-out loss {loss:.2f}{cached}", model

    def _start_ray(self, stack: contextlib.ExitStack) -> tuple[str, str]:
        from ftray.cluster.ray_session import session

        with bar("start Ray"):
            stack.enter_context(session())
        return "a cluster of this machine, on loopback, behind a token", ""

    def _fine_tune(self, task: str) -> tuple[str, str]:
        from ftray.train.ray_launch import launch

        recipe = load(Recipe, self.examples / f"{task}.yaml")
        with run_bars(task) as (on_prepare, on_record):
            result = launch(recipe, on_record=on_record, on_prepare=on_prepare)
        assert result.delta is not None
        self._deltas[task] = result.delta
        workers = recipe.strategy.num_workers
        shown = (
            f"{result.step} steps on {workers} Ray Train workers, eval loss {result.metrics['eval_loss']:.3f}"
        )
        console.print(f"rows: {counts_line(result.rows)}", highlight=False)
        return f"LoRA, {shown}", _relative(result.run_dir)

    def _search(self) -> tuple[str, str]:
        from ftray.tune.ray_trials import run

        config = load(TuneConfig, self.examples / "tune.yaml")
        # What the base's training timed as faster on this machine; members must not time for themselves.
        bf16 = f"train.bf16={str(read_json(self.folder / 'base.json')['bf16']).lower()}"
        config = replace(config, "overrides", [*config.overrides, bf16])
        done, total = 0, None
        with bar(f"search: {config.num_segments} segments a member") as progress:

            def on_record(record: dict[str, Any]) -> None:
                nonlocal done, total
                if record["kind"] == "open":
                    total = len(record["configs"]) * config.num_segments
                done += record["kind"] == "commit"
                progress(done, total)

            result = run(config, on_record=on_record)
        if not result.num_perturbations:
            raise TuneError("search: no member was perturbed; the search did not search")
        assert result.delta is not None
        self._deltas[TASKS[0]] = result.delta
        self._lineage[TASKS[0]] = {"run": str(result.folder), "parents": []}
        found = ", ".join(f"{path} {value:.3g}" for path, value in result.config.items())
        return (
            f"{result.num_segments} segments, {result.num_perturbations} perturbations; winner: {found}, "
            f"{result.metric} {result.score:.3f}",
            _relative(result.folder / "tune.png"),
        )

    def _evaluate(self, task: str) -> tuple[str, Path]:
        from ftray.eval.report import difference_table, score_table
        from ftray.eval.run import evaluate_config

        delta = _relative(self._deltas[task])
        config = load(EvalConfig, self.examples / f"eval-{task}.yaml", [f"deltas=[{delta!r}]"])
        with bar("ask the held-out questions") as progress:
            report = evaluate_config(config, progress)
        self._reports[task] = report
        for note in [*report.notes, *(f"not asked: {row}" for row in report.quarantined)]:
            console.print(note, highlight=False, markup=False)
        out.print(score_table(report), difference_table(report.differences))
        if not report.beats_all(delta):
            raise FtrayError(
                f"{task}: the tuned delta is not better than the base and the constant; see {config.output}"
            )
        tuned = report.result(delta).interval
        return (
            f"{tuned.estimate:.1%} right [{tuned.low:.1%}, {tuned.high:.1%}] of {len(report.expected)}, beats all",
            Path(config.output),
        )

    def _publish(self) -> tuple[str, Path]:
        from ftray.eval.publish import publish
        from ftray.registry.registry import Registry

        folder = self.folder / "registry"
        for task in TASKS:
            accuracy = self._reports[task].result(_relative(self._deltas[task])).interval.estimate
            with bar(MEASURING):
                entry = publish(
                    Registry(folder),
                    self._deltas[task],
                    task,
                    base=str(self.folder / "base" / "delta"),
                    aliases=("prod",),
                    metrics={"exact_match": accuracy},
                    lineage=self._lineage.get(task),
                )
            for line in published_lines(entry):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
        return f"{len(TASKS)} deltas, measured alone, merged and served, each also `@prod`", folder

    def _serve(self, keep_serving: bool) -> None:
        from ftray.serve.ray_app import run

        keys = {task: secrets.token_urlsafe(32) for task in TASKS}
        for task, key in keys.items():
            variable = f"{TENANTS[task].upper()}_KEY_SHA256"
            os.environ[variable] = hashlib.sha256(key.encode()).hexdigest()
        config = load(ServeConfig, self.examples / "serve.yaml", [] if keep_serving else ["port=0"])
        handle = None
        try:

            def start() -> tuple[str, str]:
                nonlocal handle
                with bar("start the endpoint"):
                    handle = run(config)
                return (
                    f"base, {', '.join(TASKS)} for tenants {', '.join(TENANTS.values())}",
                    f"{handle.url}/v1",
                )

            self._stage("serve", start)
            assert handle is not None
            url = handle.url
            self._stage("ask", lambda: (ask_all(url, keys, TENANTS, self.folder / "corpus"), f"{url}/v1"))
            console.print("\n".join(curl_lines(url, keys)), highlight=False, soft_wrap=True, markup=False)
            if keep_serving:
                self._summary()
                console.print("serving until Ctrl-C")
                _wait_for_interrupt()
        finally:
            if handle is not None:
                with bar("stop the endpoint"):
                    handle.stop()

    def _summary(self) -> None:
        if not self._rows:
            return
        table = Table(title="from text to endpoint")
        for name in ("stage", "seconds", "what was made", "where"):
            table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
        for name, seconds, made, where in self._rows:
            table.add_row(name, f"{seconds:.0f}", Text(made), Text(where))
        table.add_row("total", f"{sum(row[1] for row in self._rows):.0f}", "", "")
        out.print(table)
        names = ("stage", "seconds", "made", "where")
        write_json(self.folder / "walk.json", [dict(zip(names, row, strict=True)) for row in self._rows])
        self._rows.clear()


def _relative(path: Path) -> str:
    """A path as a person standing here would write it."""
    return os.path.relpath(path)


def _wait_for_interrupt() -> None:
    import signal

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
