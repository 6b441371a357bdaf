"""What the trials of a search claim of the cluster."""

from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.strategy.elastic import bounds

_WAITING_CPUS = 0.01


def resources(config: TuneConfig, recipe: Recipe) -> dict[str, float]:
    """What a trial claims. One that is a worker group only waits while its workers, who claim their own, train."""
    if not recipe.strategy.in_process:
        return {"cpu": _WAITING_CPUS, "gpu": 0.0, **config.resources_per_trial}
    return {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial, **config.resources_per_trial}


def gpus(config: TuneConfig, recipe: Recipe) -> float:
    """GPUs that train a trial's segments: those it claims, or those of the most workers its group may have."""
    strategy = recipe.strategy
    if strategy.in_process:
        return config.gpus_per_trial
    from ftray.train.ray_group import resources_of  # imports torch, which other searches' drivers do not need

    least, most = bounds(strategy.num_workers)
    return most * resources_of(least, strategy.cpus_per_worker).get("GPU", 0.0)
