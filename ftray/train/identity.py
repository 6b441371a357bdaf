"""Which run a checkpoint belongs to, and what a run may go on with."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import CheckpointError
from ftray.core.fs import digest_json
from ftray.core.spec import dump
from ftray.model.identity import base_identity

# What changes when something is written or how a step is cut, but no number beyond rounding.
_HOUSEKEEPING = (
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "save_best",
    "watchdog_s",
    "watchdog_slow_s",
    "elastic_interval_s",
    "logging_steps",
    "per_device_train_batch_size",
    "gradient_checkpointing",
    "publish_ema",
    "early_stopping_patience",
    "early_stopping_threshold",
    "profile_steps",
)
_LENGTH = ("max_steps", "num_train_epochs", "max_tokens", "max_time_s")
_OTHER = {
    "data": "other training rows (sources, transforms, tokenizer or sizes of `data`)",
    "order": "another `data.window_shards`, `data.mixture` or read-time transform",
    "seed": "`seed: {then}`, now it is {now}",
    "global_batch_size": "`train.global_batch_size: {then}`, now it is {now}",
}
_ROWS_NEXT = ("data", "seed", "global_batch_size", "order")


def run_identity(recipe: Recipe, data_digest: str) -> dict[str, Any]:
    """What says what may continue what.

    `run`: everything that changes the numbers, but not the strategy (another world size continues the same
    curve), nor how often something is saved, nor the run's length where the schedule does not depend on it.
    `structure`: what the tensors' shapes and the rows depend on; a population's members share it while they differ
    in the rest. `data`, `seed`, `global_batch_size` and `order` decide which rows come next; a run goes on with
    other ones only if told to. `settings` are those behind `run` and `structure`, to name what differs.
    """
    tree = dump(recipe)
    for key in _HOUSEKEEPING:
        tree["train"].pop(key)
    if not getattr(recipe.lr_scheduler, "depends_on_length", True):
        for key in _LENGTH:
            tree["train"].pop(key)
    if recipe.model.init == "pretrained":
        # Which weights, not where they lie: a base may move, and another under the same path is another.
        base = base_identity(recipe.model.model_name_or_path)["digest"]
        tree["model"] = {"base": base, "dtype": recipe.model.dtype}
    structure = {key: tree[key] for key in ("model", "adapt")}
    batch_size = tree["train"].pop("global_batch_size")
    run = {key: tree[key] for key in ("objective", "optim", "lr_scheduler", "train")}
    return {
        "run": digest_json(run),
        "structure": digest_json(structure),
        "data": data_digest,
        "seed": recipe.seed,
        "global_batch_size": batch_size,
        "order": digest_json(
            [tree["data"]["window_shards"], tree["data"]["mixture"], dump(recipe.data.read_transforms)]
        ),
        "settings": {"run": run, "structure": structure},
    }


def check_identity(
    path: Path,
    made_with: Mapping[str, Any],
    identity: Mapping[str, Any],
    same_run: bool,
    accept_changed_data: bool,
) -> None:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        path: the checkpoint.
        made_with: the identity of the run that committed it.
        identity: that of the run at hand.
        same_run: it must be this very run's; otherwise of the same structure and data.
        accept_changed_data: what decides which rows come next may differ.

    Raises:
        CheckpointError: one line with the first difference and the remedy.
    """
    keys = ("run", "structure", *_ROWS_NEXT) if same_run else ("structure", "data")
    for key in keys:
        then, now = made_with.get(key), identity[key]
        if then == now or (accept_changed_data and key in _ROWS_NEXT):
            continue
        what = _OTHER[key].format(then=then, now=now) if key in _OTHER else _setting(key, made_with, identity)
        remedy = "give this run another `name`"
        if key in _ROWS_NEXT:
            remedy += ", or go on all the same with `--accept-changed-data`"
        raise CheckpointError(f"{path}: was made with {what}; {remedy}")


def _setting(key: str, made_with: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """The first setting that differs, as it was and as it is."""
    then, now = made_with.get("settings", {}).get(key, {}), identity["settings"][key]
    found = list(_differences(then, now))
    # A schedule or an objective of another type explains the fields that come and go with it.
    field, was, is_now = next((d for d in found if d[0].endswith(".type")), found[0])
    if field == "model.base":
        return "other weights (`model.model_name_or_path`)"
    told = f"`{field}: {was}`, now it is {is_now}"
    if field.removeprefix("train.") in _LENGTH:
        schedule = identity["settings"]["run"]["lr_scheduler"]["type"]
        told += (
            f", and the learning rate of `{schedule}` follows the length of the run: the steps before would have "
            "been others; with `lr_scheduler: constant` a run can be made longer"
        )
    return told


def _differences(then: Any, now: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}, key=str):
            yield from _differences(then.get(key), now.get(key), f"{field}.{key}" if field else str(key))
    elif then != now:
        yield field, then, now
