"""Metrics, by themselves and out of the catalog."""

from ftray.core.spec import build_piece
from ftray.eval.metrics import ExactMatch


def test_exact_match_leaves_spaces_aside_and_nothing_else() -> None:
    metric = ExactMatch()
    assert metric.score(" ValueError\n", "ValueError") == 1.0
    assert metric.score("valueerror", "ValueError") == 0.0
    assert metric.score("ValueError is raised", "ValueError") == 0.0
    assert metric.score("", "ValueError") == 0.0


def test_exact_match_from_the_catalog_takes_settings() -> None:
    assert build_piece("metric", "exact_match") == ExactMatch()
    assert build_piece("metric", {"type": "exact_match", "ignore_case": True}).score("A", "a") == 1.0
