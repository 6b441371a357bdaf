"""Recipes over one small corpus under several strategies, and what became of them."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.spec import parse
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards
from ftray.testing import tiny
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train

NUM_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class World:
    """A strategy on a number of ranks."""

    strategy: str
    size: int

    def __str__(self) -> str:
        return f"{self.strategy}{self.size}"

    @property
    def config(self) -> Any:
        return "single" if self.strategy == "single" else {"type": self.strategy, "num_workers": self.size}


REFERENCE = World("single", 1)


class Runs:
    """Recipes over one small corpus, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[Any] = []
        """What each rank returned."""
        words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
        rows = [
            {
                "prompt": f"{words[i % 8]}-{i:03d}\n# Answer:",
                "completion": " " + words[i % 8][0] * (2 + i % 5),
            }
            for i in range(NUM_DOCUMENTS + 3)
        ]
        self._write("train", rows[:NUM_DOCUMENTS])
        self._write("validation", rows[NUM_DOCUMENTS:])
        answers = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows[:4]
        ]
        self._write("pairs", answers)
        for name in ("llama", "qwen3", "qwen3_moe", "gpt2"):
            tiny.tiny_base(folder / name, name)
        tiny.tiny_base(folder / "gemma3", "gemma3", final_logit_softcapping=4.0)

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(
        self,
        name: str,
        *,
        base: str = "llama",
        world: World = REFERENCE,
        packing: bool = True,
        train_rows: str = "train",
        **changes: Any,
    ) -> Recipe:
        plain = train_rows == "train"
        model: dict[str, Any] = {"model_name_or_path": str(self.folder / base)}
        if base == "random":
            config = {**tiny.ARCHITECTURES["llama"], "vocab_size": 258}
            tokenizer = str(self.folder / "llama")
            model = {"init": "config", "config": config, "tokenizer_name_or_path": tokenizer}
        tree = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": model,
            "data": {
                "train": str(self.folder / f"{train_rows}.jsonl"),
                "validation": str(self.folder / "validation.jsonl") if plain else [],
                "max_length": 64,
                "packing": packing,
                "cache_dir": str(self.folder / "cache"),
            },
            "adapt": "full",
            "objective": "sft",
            "optim": {"type": "adamw", "learning_rate": 5e-3},
            "lr_scheduler": "linear",
            "strategy": world.config,
            **changes,
            "train": {
                "max_steps": 3,
                "global_batch_size": NUM_DOCUMENTS,
                "per_device_train_batch_size": NUM_DOCUMENTS,
                "bf16": False,
                **changes.get("train", {}),
            },
        }
        return parse(Recipe, tree)

    def cut(self, name: str, world: World, adapt: str, packing: bool, accumulation: int) -> Recipe:
        """All documents in each step, packed or not, in one micro batch or in four (by ranks: fewer)."""
        probe = self.recipe("probe", packing=packing)
        rows = len(Shards(prepare_local(probe.data, probe.model.tokenizer, "train")))
        assert (rows < NUM_DOCUMENTS) == packing and rows % 4 == 0
        batches = {"global_batch_size": rows, "per_device_train_batch_size": rows // accumulation}
        settings = {"type": "lora", "r": 4} if adapt == "lora" else adapt
        return self.recipe(name, world=world, adapt=settings, packing=packing, train=batches)

    def dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def curve(self, name: str) -> list[float]:
        """Losses and gradient norms of the steps, and the last validation loss if there is one."""
        records = read_records(self.dir(name) / "metrics.jsonl")
        steps = [(record["loss"], record["grad_norm"]) for record in records if "grad_norm" in record]
        last = [value for record in records[-1:] if (value := record.get("eval_loss")) is not None]
        return [*itertools.chain(*steps), *last]


def go(recipes: list[Recipe], stop_at: int | None = None) -> None:
    for recipe in recipes:
        train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop_at)
