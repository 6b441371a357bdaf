"""A run's result as a delta folder that plain PEFT, transformers and vLLM load."""

import math
from pathlib import Path
from typing import Any

from ftray.adapt.base import Tensors
from ftray.config.recipe import Recipe
from ftray.core.fs import replace_dir
from ftray.core.spec import dump
from ftray.delta import manifest
from ftray.model.folder import resolve_folder
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.train.checkpoint import State
from ftray.train.feed import Feed

_CARD = """---
library_name: {library}
{base_line}tags: [ftray]
---
# {name}

{kind} delta trained by ftray: objective `{objective}`, {step} steps, {tokens} tokens.

| metric | value |
|---|---|
{metrics}
"""


def save_delta(
    recipe: Recipe,
    model: Any,
    trained: Tensors,
    run_dir: Path,
    feed: Feed,
    metrics: dict[str, float],
    state: State,
    adapter: str | None = None,
) -> Path:
    """Write `run_dir/delta`: weights, tokenizer, chat template, model card and manifest; returns the folder.

    Args:
        recipe: the run.
        model: its model; sharded weights need not be whole in it.
        trained: what trained, whole, one tensor at a time.
        run_dir: the run's folder.
        feed: says what rows were seen.
        metrics: the last ones.
        state: where the run stands.
        adapter: what trained, where the model has adapters of several runs.
    """
    named = {} if adapter is None else {"name": adapter}
    final = run_dir / "delta"
    with replace_dir(final) as folder:
        recipe.adapt.save(model, trained, folder, recipe.model.model_name_or_path, **named)
        _describe(recipe, folder, feed, metrics, state)
    return final


def _describe(recipe: Recipe, folder: Path, feed: Feed, metrics: dict[str, float], state: State) -> None:
    tokenizer = load_tokenizer(recipe.model.tokenizer)
    tokenizer.save_pretrained(folder)
    facts = recipe.adapt.facts()
    (folder / "README.md").write_text(_card(recipe, facts.kind, metrics, state), "utf-8")
    if recipe.model.init == "pretrained":
        base = base_identity(resolve_folder(recipe.model.model_name_or_path))
    else:
        # Trained from random weights, it is its own base.
        base = base_identity(folder)
    manifest.write(
        folder,
        kind=facts.kind,
        base=base,
        chat_template_hash=chat_template_hash(tokenizer),
        recipe=dump(recipe),
        lineage={**manifest.data_lineage(feed.manifests[0]), "run": recipe.name},
        metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
    )


def _card(recipe: Recipe, kind: str, metrics: dict[str, float], state: State) -> str:
    base = recipe.model.model_name_or_path
    return _CARD.format(
        library="peft" if kind == "low_rank" else "transformers",
        base_line=f"base_model: {base}\n" if base else "",
        name=recipe.name,
        kind=kind.replace("_", "-"),
        objective=type(recipe.objective).__name__,
        step=state.step,
        tokens=state.tokens,
        metrics="\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items()),
    )
