"""TRL's group relative policy optimisation (Shao et al., arXiv:2402.03300), with a reward of the user's own."""

import dataclasses
import difflib
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from ftray.adapt.lora import LoRA
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.train.opaque.base import OpaqueTrainer, user_function
from ftray.train.opaque.context import Context

_OURS = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "max_grad_norm",
    "gradient_checkpointing",
    "bf16",
    "use_cpu",
    "report_to",
    "shuffle_dataset",
}
"""Arguments of TRL that follow from the recipe."""


@spec
class TrlGRPO(OpaqueTrainer):
    """TRL's `GRPOTrainer` on rows with a `prompt`: several answers to each, those above their mean reinforced.

    Batch sizes of the recipe count answers, as in TRL: `train.global_batch_size` is a multiple of the answers to a
    prompt.
    """

    reward: Annotated[
        list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = Field(min_length=1)
    """`package.module:function`, or several: called with `prompts`, `completions` and the rows' other columns as
    lists, gives a number for each completion."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens of an answer."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Base learning rate."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the base."""
    columns: list[str] = Field(default_factory=list)
    """Columns that rewards need and known shapes of rows lack; of columnar files only named ones are read."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further fields of TRL's `GRPOConfig`."""

    def check(self, recipe: Recipe) -> str:
        """Also TRL's arguments and that the rewards can be imported."""
        for path in self.reward:
            user_function(path, "trainer.reward")
        line = super().check(recipe)
        self._check_args()
        if recipe.train.global_batch_size % self.num_generations:
            raise ConfigError(
                f"train.global_batch_size: {recipe.train.global_batch_size} answers are no multiple of the "
                f"{self.num_generations} of each prompt; change one of the two"
            )
        return line

    def _check_args(self) -> None:
        from trl.trainer.grpo_config import GRPOConfig

        known = {field.name for field in dataclasses.fields(GRPOConfig)}
        own = {field.name for field in dataclasses.fields(self)}
        for name in self.args:
            if name in _OURS or name in own:
                where = "its own field" if name in own else "the recipe"
                raise ConfigError(f"trainer.args: `{name}` follows from {where}; set it there")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "see its documentation"
                raise ConfigError(f"trainer.args: TRL's GRPOConfig has no `{name}`; {hint}")

    def run(self, context: Context) -> None:
        """Train with TRL and save as it does."""
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        recipe, context.columns = context.recipe, self.columns
        rows = context.dataset("train")
        if "prompt" not in rows.column_names:
            raise ConfigError("data.train: rows have no `prompt`; name the column in `data.columns`")
        try:
            settings = GRPOConfig(**self._settings(context))
            trainer = GRPOTrainer(
                # By name: with `beta` TRL loads the reference itself.
                str(context.model_dir),
                reward_funcs=[user_function(path, "trainer.reward") for path in self.reward],
                args=settings,
                train_dataset=rows,
                processing_class=context.tokenizer,
                peft_config=peft_config(recipe.adapt),
                callbacks=[log_callback(context)],
            )
        except ValueError as error:
            raise ConfigError(f"trainer: TRL refuses this ({' '.join(str(error).split())[:200]})") from None
        checkpoint = context.checkpoint
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if context.rank == 0:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(context.output_dir)

    def _settings(self, context: Context) -> dict[str, Any]:
        train, on_gpu = context.recipe.train, torch.cuda.is_available()
        rows_at_once = train.per_device_train_batch_size * context.world_size
        if train.global_batch_size % rows_at_once:
            raise ConfigError(
                f"train.global_batch_size: {train.global_batch_size} is no multiple of {rows_at_once}, the answers "
                f"that {context.world_size} workers take at once (`train.per_device_train_batch_size` each)"
            )
        length = (
            {"max_steps": train.max_steps}
            if train.max_steps
            else {"num_train_epochs": train.num_train_epochs}
        )
        model_init = {"dtype": context.recipe.model.dtype} | dict(self.args.get("model_init_kwargs", {}))
        return {
            "output_dir": str(context.work_dir),
            **length,
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "gradient_accumulation_steps": train.global_batch_size // rows_at_once,
            "logging_steps": train.logging_steps,
            "save_strategy": "steps" if train.save_steps else "no",
            "save_steps": train.save_steps or 500,
            "save_total_limit": train.save_total_limit,
            "seed": context.recipe.seed,
            "max_grad_norm": train.max_grad_norm or 0.0,
            "gradient_checkpointing": train.gradient_checkpointing,
            "bf16": on_gpu if train.bf16 == "auto" else train.bf16,
            "use_cpu": not on_gpu,
            "report_to": "none",
            "disable_tqdm": True,
            "shuffle_dataset": False,
            "num_generations": self.num_generations,
            "max_completion_length": self.max_completion_length,
            "learning_rate": self.learning_rate,
            "beta": self.beta,
            **self.args,
            "model_init_kwargs": model_init,
        }


def peft_config(adapt: Any) -> Any:
    """The recipe's adapter as PEFT names it; None where every weight trains."""
    if not isinstance(adapt, LoRA):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=adapt.r,
        lora_alpha=adapt.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapt.lora_dropout,
        target_modules=adapt.target_modules,
        target_parameters=adapt.target_parameters or None,
        use_rslora=adapt.use_rslora,
        task_type="CAUSAL_LM",
    )


def log_callback(context: Context) -> Any:
    """A transformers callback that hands what a `Trainer` logs to the run's log."""
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and logs:
                numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
                context.log(int(state.global_step), **numbers)

    return Log()
