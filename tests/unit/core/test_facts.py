"""Facts of pieces: a conflict names both sides, in one line."""

from typing import ClassVar

import pytest

from ftray.core.errors import ConfigError
from ftray.core.facts import check_facts


class Whole:
    needs: ClassVar = {"whole_matrices": "orthogonalises whole matrices"}


class Sharded:
    lacks: ClassVar = {"whole_matrices": "each rank holds a part of them"}


class Replicated:
    supplies: ClassVar = ("whole_matrices",)


class Switch:
    def __init__(self, on: bool) -> None:
        self.lacks = {"whole_matrices": "they are packed"} if on else {}


def test_a_conflict_names_both_sides() -> None:
    with pytest.raises(ConfigError) as refused:
        check_facts({"strategy": Sharded(), "adapt": object(), "optim": Whole()})
    assert str(refused.value) == (
        "optim: `Whole` orthogonalises whole matrices, but with strategy `Sharded` each rank holds a part of them; "
        "change one of the two"
    )


def test_what_is_supplied_is_not_lacking() -> None:
    check_facts({"strategy": Sharded(), "adapt": Replicated(), "optim": Whole()})
    check_facts({"strategy": Sharded(), "optim": object()})


def test_facts_may_follow_from_settings() -> None:
    check_facts({"optim": Whole(), "adapt": Switch(False)})
    with pytest.raises(ConfigError, match="with adapt `Switch` they are packed"):
        check_facts({"optim": Whole(), "adapt": Switch(True)})
