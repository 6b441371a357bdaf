"""What runs a trainer that is not ours: it gets rows, a folder and a log, and leaves an adapter or a model.

Everything around it is as in any run: where it runs (this process or Ray Train workers), the run folder with
`recipe.yaml` and `metrics.jsonl`, trackers, and a delta with its base, lineage and digests. What its loop does is
its own affair, so most promises of ours do not hold; `PROMISES` says which, and every run prints it.
"""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

from ftray.adapt.full import Full
from ftray.adapt.lora import LoRA
from ftray.catalog import name_of
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, TrainError
from ftray.core.fs import replace_dir, write_json
from ftray.core.spec import dump
from ftray.core.types import finite
from ftray.delta.adopt import adopt, adopt_model
from ftray.delta.manifest import data_lineage
from ftray.model.build import build_structure
from ftray.strategy.ddp import DDP
from ftray.strategy.single import Single
from ftray.train.io import IO
from ftray.train.oom import explained
from ftray.train.opaque.context import Context
from ftray.train.run import Result

PROMISES = (
    "rows are handed as they are read: no transforms, packing or mixture; the first epoch is in our order",
    "losses are not the same on another number of workers, and a resumed run need not follow the same curve",
    "checkpoints are the trainer's own: not transactions, and not checked before they are used",
    "no watchdog, no policy for losses that are not finite, no orderly end on a signal",
)
"""What does not hold under a trainer that is not ours."""


class OpaqueTrainer:
    """One trainer of somebody else's: one file and one line in the catalog."""

    def check(self, recipe: Recipe) -> str:
        """Find what would stop a run before hardware is taken; returns a line on what is not promised.

        Raises:
            ConfigError: one line, for a strategy or an adapter it cannot work with.
        """
        name = name_of(type(self)) or type(self).__name__
        if not isinstance(recipe.strategy, Single | DDP):
            raise ConfigError(
                f"strategy: `{name_of(type(recipe.strategy))}` spreads the model, and `{name}` holds it whole on "
                "each worker; take `single` or `ddp`"
            )
        if not isinstance(recipe.adapt, LoRA | Full):
            raise ConfigError(f"adapt: `{name}` trains with `lora` or `full`")
        if recipe.model.init != "pretrained":
            raise ConfigError(f"model.init: `{name}` starts from pretrained weights; set `init: pretrained`")
        build_structure(recipe.model, empty=True)
        return f"trainer: {name}; not promised: {'; '.join(PROMISES)}"

    def run(self, context: Context) -> None:
        """Train, and leave a PEFT adapter or a model in `context.output_dir` on rank 0. Called on every rank."""
        raise NotImplementedError

    def train(self, recipe: Recipe, io: IO) -> Result:
        """Run it in this worker with everything around it."""
        context, not_promised = Context(recipe, io), self.check(recipe)
        strategy, main = recipe.strategy, recipe.strategy.dp_rank == 0
        try:
            if main:
                io.claim()
                io.open(recipe, context.resume_step)
                print(not_promised, file=sys.stderr, flush=True)
            strategy.barrier()
            with explained(recipe):
                self.run(context)
            strategy.barrier()
            return _finish(recipe, io, context)
        finally:
            io.close()


def _finish(recipe: Recipe, io: IO, context: Context) -> Result:
    metrics = {
        key: float(value)
        for key, value in context.last.items()
        if isinstance(value, int | float) and key not in ("step", "progress") and math.isfinite(value)
    }
    step = int(context.last.get("step", 0))
    rows = context.counts
    delta = io.run_dir / "delta"
    result = Result(io.run_dir, None, delta, metrics, step, 0, False, rows)
    if recipe.strategy.dp_rank == 0:
        _adopt(recipe, context, delta, metrics)
        io.log({**context.last, "step": step, "progress": 1.0, "final": True})
        write_json(io.run_dir / "result.json", finite(dump(result)))
    recipe.strategy.barrier()
    return result


def _adopt(recipe: Recipe, context: Context, delta: Path, metrics: dict[str, float]) -> None:
    """Turn what the trainer left into the run's delta."""
    rows = context.raw("train")
    data = data_lineage({"digest": rows.digest, "sources": rows.sources})
    fields = {
        "recipe": dump(recipe),
        "lineage": {**data, "run": recipe.name},
        "metrics": metrics,
    }
    found, base = context.output_dir, recipe.model.model_name_or_path
    with replace_dir(delta) as folder:
        if (found / "adapter_config.json").is_file():
            adopt(found, base, folder, **fields)
        elif (found / "config.json").is_file():
            adopt_model(found, base, folder, **fields)
        else:
            raise TrainError(
                f"{found}: the trainer left neither an adapter nor a model here; call `save_pretrained` on rank 0"
            )


def user_function(path: str, field: str) -> Any:
    """The function behind `package.module:function`. Raises `ConfigError` if there is none."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{field}: {path!r} cannot be imported ({error}); write `package.module:function`"
        ) from None
    if not callable(found):
        raise ConfigError(f"{field}: {path!r} is no function; write `package.module:function`")
    return found
