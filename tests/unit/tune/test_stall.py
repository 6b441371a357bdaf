import os

from ftray.tune.stall import StallWatch


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_silence_is_a_stall(tmp_path):
    clock = Clock()
    watch = StallWatch(tmp_path / "segments", 10.0, clock)
    progress = tmp_path / "segments" / "m000-s000-abc" / "progress" / "rank-0.json"
    progress.parent.mkdir(parents=True)
    progress.write_text("{}")
    for number in range(6):  # files that change keep it alive
        clock.now += 8
        os.utime(progress, (number, number))
        assert watch.stalled(["m000-s000-abc"]) is None
    clock.now += 8
    watch.tell()  # so do records of the journal
    clock.now += 8
    assert watch.stalled(["m000-s000-abc"]) is None
    clock.now += 3
    message = watch.stalled(["m000-s000-abc"])
    assert message is not None and "no progress for 10 s, m000-s000-abc" in message and "--resume" in message


def test_a_search_may_be_left_to_wait(tmp_path):
    clock = Clock()
    watch = StallWatch(tmp_path, None, clock)
    clock.now = 1e9
    assert watch.stalled(["m000"]) is None
