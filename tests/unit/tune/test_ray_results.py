"""What Ray Tune's callbacks are told of the segments that one trial trained."""

from dataclasses import replace

from ftray.tune.engine import Segment
from ftray.tune.ray_results import results
from ftray.tune.segment import Outcome

SEGMENT = Segment(
    name="m000-s001-abc",
    member=0,
    segment=1,
    epoch=1,
    attempt=0,
    checkpoint=None,
    config={"optim.learning_rate": 0.1},
    stop_at=8,
)


def test_each_segment_of_a_trial_has_a_result_of_its_own_also_one_that_failed() -> None:
    told = results(
        [SEGMENT, replace(SEGMENT, member=3, config={"optim.learning_rate": 0.2})],
        [
            Outcome(score=0.5, metrics={"eval_loss": 0.5, "loss": 0.75}, seconds=2.0, cpu_s=1.5, tokens=40),
            Outcome(error="it diverged"),
        ],
    )
    common = {"segment": 1, "steps": 8}
    assert told == [
        {
            **common,
            "member": 0,
            "hyperparameters": {"optim.learning_rate": 0.1},
            "score": 0.5,
            "eval_loss": 0.5,
            "loss": 0.75,
            "seconds": 2.0,
            "cpu_s": 1.5,
            "tokens": 40,
        },
        {
            **common,
            "member": 3,
            "hyperparameters": {"optim.learning_rate": 0.2},
            "error": "it diverged",
            "seconds": 0.0,
            "cpu_s": 0.0,
            "tokens": 0,
        },
    ]
