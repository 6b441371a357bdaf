"""Every method by name: one line here adds one. Nothing is imported until a name is used.

Wherever a name is accepted, `package.module:attr` of the user's own code is too.
"""

import difflib
import functools
import importlib
from typing import Any

from ftray.core.errors import ConfigError

METHODS: dict[str, dict[str, str]] = {
    "adapt": {
        "full": "ftray.adapt.full:Full",
        "lora": "ftray.adapt.lora:LoRA",
    },
    "objective": {
        "distill": "ftray.objective.distill:Distill",
        "dpo": "ftray.objective.dpo:DPO",
        "lm": "ftray.objective.lm:LanguageModelling",
        "reward": "ftray.objective.reward:Reward",
        "sft": "ftray.objective.lm:SupervisedFineTuning",
    },
    "optim": {
        "adamw": "ftray.optim.adamw:AdamW",
        "muon": "ftray.optim.muon:Muon",
        "torch": "ftray.optim.library:TorchOptimizer",
    },
    "lr_scheduler": {
        # Names of transformers for the same; the last name of a class is the one that is written.
        "constant_with_warmup": "ftray.optim.schedule:Constant",
        "cosine_with_min_lr": "ftray.optim.schedule:Cosine",
        "warmup_stable_decay": "ftray.optim.schedule:WarmupStableDecay",
        "constant": "ftray.optim.schedule:Constant",
        "linear": "ftray.optim.schedule:Linear",
        "cosine": "ftray.optim.schedule:Cosine",
        "wsd": "ftray.optim.schedule:WarmupStableDecay",
    },
    "strategy": {
        "single": "ftray.strategy.single:Single",
        "ddp": "ftray.strategy.ddp:DDP",
        "deepspeed": "ftray.strategy.deepspeed:DeepSpeed",
        "fsdp": "ftray.strategy.fsdp:FSDP",
    },
    "tracker": {
        "jsonl": "ftray.train.track.jsonl:Jsonl",
        "tensorboard": "ftray.train.track.tensorboard:TensorBoard",
        "wandb": "ftray.train.track.wandb:WandB",
    },
    "trainer": {
        "train_fn": "ftray.train.opaque.train_fn:TrainFn",
        "trl_grpo": "ftray.train.opaque.trl_grpo:TrlGRPO",
    },
    "transform": {
        "clean": "ftray.data.transform.clean:Clean",
        "dedup": "ftray.data.transform.dedup:ExactDedup",
        "goldfish": "ftray.data.transform.goldfish:Goldfish",
        "language": "ftray.data.transform.language:Language",
        "length": "ftray.data.transform.length:Length",
        "near_dedup": "ftray.data.transform.near_dedup:NearDedup",
        "pii": "ftray.data.transform.pii:Pii",
        "prompt_weight": "ftray.data.transform.prompt_weight:PromptWeight",
        "quality": "ftray.data.transform.quality:Quality",
        "split": "ftray.data.transform.split:Split",
    },
    "combine": {
        "add": "ftray.delta.combine.add:Add",
        "average": "ftray.delta.combine.average:Average",
        "interpolate": "ftray.delta.combine.interpolate:Interpolate",
        "scale": "ftray.delta.combine.scale:Scale",
        "ties": "ftray.delta.combine.ties:Ties",
    },
    "metric": {
        "exact_match": "ftray.eval.metrics:ExactMatch",
    },
    "engine": {
        "torch": "ftray.engine.torch_engine:TorchEngineConfig",
        "hf_generate": "ftray.engine.hf_generate:HFGenerateConfig",
        "vllm": "ftray.engine.vllm_engine:VLLMEngineConfig",
        "fake": "ftray.engine.fake:FakeEngineConfig",
    },
    "executor": {
        "population": "ftray.tune.executor:Populations",
        "trials": "ftray.tune.executor:Trials",
    },
    "search": {
        "asha": "ftray.tune.asha:ASHA",
        "grid": "ftray.tune.grid:Grid",
        "pbt": "ftray.tune.pbt:PBT",
        "random": "ftray.tune.random_search:Random",
        "ray": "ftray.tune.ray_searcher:RaySearcher",
        "tpe": "ftray.tune.tpe:TPE",
    },
}


def names(kind: str) -> list[str]:
    """The names of one kind of method, in the order of the table."""
    return list(METHODS[kind])


@functools.cache
def resolve(kind: str, name: str) -> Any:
    """The class or function behind a name or a `module:attr` path.

    Raises:
        ConfigError: for an unknown name, with the nearest known one, or a path that cannot be imported.
    """
    target = METHODS[kind].get(name)
    if target is None:
        if ":" not in name:
            near = difflib.get_close_matches(name, names(kind), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names(kind))}"
            raise ConfigError(f"{name!r} is not a {kind}; {hint} (or `package.module:attr` of your own)")
        target = name
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r} cannot be imported as a {kind}: {error}") from error
    if target == name:
        _USERS_OWN[found] = name
    return found


def name_of(cls: type) -> str | None:
    """The catalog name of a class, the `module:attr` path by which it was resolved, or None."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return _names_by_path().get(path) or _USERS_OWN.get(cls)


@functools.cache
def _names_by_path() -> dict[str, str]:
    return {target: name for table in METHODS.values() for name, target in table.items()}


_USERS_OWN: dict[type, str] = {}
