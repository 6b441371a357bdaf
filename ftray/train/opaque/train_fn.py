"""A user's own training function."""

from pydantic import Field

from ftray.config.recipe import Recipe
from ftray.core.spec import spec
from ftray.train.opaque.base import OpaqueTrainer, user_function
from ftray.train.opaque.context import Context


@spec
class TrainFn(OpaqueTrainer):
    """Calls `function(context)` on every worker; rank 0 leaves an adapter or a model in `context.output_dir`.

    `context` is a `ftray.train.opaque.context.Context`: `dataset()` and `rows()` give the rows in our order,
    `model_dir` and `tokenizer` the base, `log(step, **metrics)` writes metrics. With several workers the process
    group is there already.
    """

    function: str = Field(min_length=1)
    """`package.module:function`."""

    def check(self, recipe: Recipe) -> str:
        """Also that the function can be imported."""
        user_function(self.function, "trainer.function")
        return super().check(recipe)

    def run(self, context: Context) -> None:
        """Call it."""
        user_function(self.function, "trainer.function")(context)
