"""An evaluation: which rows, which models, which metric."""

from typing import Annotated, Any

from pydantic import Field

from ftray.config.recipe import RowField
from ftray.core.spec import Piece, spec


@spec
class EvalConfig:
    """One evaluation of the base and of deltas on held-out rows."""

    base: str
    """Folder or Hub id of the base model."""
    rows: str
    """JSON lines of rows; the last answer of each is what is expected."""
    columns: dict[RowField, str] = Field(default_factory=dict)
    """Where the rows hold what, if not under the known names, as `data.columns`; for `train_rows` too."""
    train_rows: str = ""
    """Training rows, for the best constant answer and the allowed answers; empty: taken from `rows`."""
    deltas: list[str] = Field(default_factory=list)
    """Delta folders or registry references."""
    registry: str = "registry"
    """Folder of the delta registry."""
    metric: Annotated[Any, Piece("metric")] = Field(default="exact_match", validate_default=True)
    """How an answer is scored."""
    rank_answers: bool = True
    """Also let the base rank the allowed answers by log-probability."""
    max_answers: int = Field(default=64, ge=2)
    """Most allowed answers that are ranked; with more there is no ranking, and the report says so."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows used; null: all."""
    max_tokens: int = Field(default=32, ge=1)
    """Tokens an answer may have."""
    engine: Annotated[Any, Piece("engine")] = Field(default="torch", validate_default=True)
    """What generates."""
    output: str = ""
    """Where the report (JSON) goes; empty: on the screen only."""
