"""What pieces need of each other, compared in one place.

A piece says facts about itself, and nothing about other pieces:

    needs      what it cannot do without, and what for
    lacks      what cannot be had in its company, and why
    supplies   what it makes available although another piece lacks it

each a mapping from a fact of `Fact` (for `supplies`, a collection of them), as a class attribute or a property
where it depends on the settings. `check_facts` finds the first need that a companion lacks and nobody supplies.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from ftray.core.errors import ConfigError

Fact = Literal[
    "whole_matrices",
    "local_gradients",
    "local_optimizer",
    "component_clipping",
    "other_world_size",
    "weights_by_name",
    "documents_apart",
]
"""What a piece may need:

- `whole_matrices`: every trained matrix is whole on each rank.
- `local_gradients`: gradients can be looked at and changed before the step.
- `local_optimizer`: the optimiser's `step` is ours to call, and its state to read.
- `component_clipping`: parts of the gradient can be clipped on their own.
- `other_world_size`: a checkpoint can be loaded by another number of workers.
- `weights_by_name`: parameters have the base's own names and shapes.
- `documents_apart`: packed documents do not attend to each other.
"""


def check_facts(pieces: Mapping[str, Any]) -> None:
    """Refuse pieces that cannot work together.

    Args:
        pieces: where in the recipe a piece stands (`strategy`) -> the piece.

    Raises:
        ConfigError: one line that names both sides of the first conflict.
    """
    supplied = {fact for piece in pieces.values() for fact in _facts(piece, "supplies")}
    for field, piece in pieces.items():
        for fact, purpose in _facts(piece, "needs").items():
            for other_field, other in pieces.items():
                reason = _facts(other, "lacks").get(fact)
                if reason is not None and fact not in supplied:
                    raise ConfigError(
                        f"{field}: {_name(piece)} {purpose}, but with {other_field} {_name(other)} {reason}; "
                        "change one of the two"
                    )


def _facts(piece: Any, kind: str) -> dict[str, str]:
    found: Mapping[str, str] | Collection[str] = getattr(piece, kind, ())
    return dict(found) if isinstance(found, Mapping) else dict.fromkeys(found, "")


def _name(piece: Any) -> str:
    from ftray.catalog import name_of

    return f"`{name_of(type(piece)) or type(piece).__name__}`"
