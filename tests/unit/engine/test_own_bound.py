"""Deltas with weights of their own: those in memory are bounded at any moment, whatever is asked for meanwhile."""

import contextlib
import random
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from ftray.core.errors import DeltaError
from ftray.engine.entry import Entry
from ftray.engine.places import OwnWeightsError
from ftray.engine.slots import Slots


@dataclass(eq=False)
class Model:
    """Stands for a whole model in memory, for as long as anybody holds it."""

    digest: str
    kind: str = "replacement"
    mixed_batch: bool = False
    size_bytes: int = 1


class Memory:
    """Reads models, and counts those that are there or are being read."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[Model] = weakref.WeakSet()
        self.most = self.num_reads = self._reading = 0
        self._lock = threading.Lock()

    def read(self, folder: str) -> Model:
        raise OwnWeightsError(folder)

    def read_own(self, folder: str) -> Model:
        with self._lock:
            self._reading += 1
            self.most = max(self.most, len(self.models) + self._reading)
            self.num_reads += 1
        time.sleep(0.0005)
        with self._lock:
            self._reading -= 1
            if folder.startswith("bad"):
                raise DeltaError(f"{folder}: damaged")
            model = Model(folder)
            self.models.add(model)
            return model

    def load(self, key: str, delta: Any) -> None:
        pass

    def unload(self, key: str) -> None:
        pass


class Crowd:
    """Sequences that come, run, are preempted and go, in any order."""

    def __init__(self, slots: Slots, draw: random.Random) -> None:
        self.slots, self.draw = slots, draw
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.num_entered = 0

    def act(self) -> None:
        self.draw.choice(
            [self.come, self.go, self.run, self.run, self.stop, self.poll, self.poll, self.load]
        )()

    def come(self) -> None:
        if (entry := self.slots.find(self.draw.choice(self.slots.names()))) and not entry.error:
            self.slots.arrive(entry)
            self.waiting.append(entry)

    def go(self) -> None:
        if self.waiting:
            self.slots.depart(self.waiting.pop(self.draw.randrange(len(self.waiting))))

    def run(self) -> None:
        for entry in list(self.waiting):
            if self.slots.enter(entry):
                self.num_entered += 1
                self.waiting.remove(entry)
                self.running.append(entry)

    def stop(self) -> None:
        if self.running:
            entry = self.running.pop(self.draw.randrange(len(self.running)))
            self.slots.leave(entry)
            self.waiting.append(entry)

    def poll(self) -> None:
        self.slots.wait(0.002)
        for failed in self.slots.poll():
            for entry in [entry for entry in self.waiting if entry is failed]:
                self.waiting.remove(entry)
                self.slots.depart(entry)

    def load(self) -> None:
        name = self.draw.choice(self.slots.names())
        with contextlib.suppress(DeltaError):
            self.slots.load(name, name if self.draw.random() < 0.7 else f"bad-{name}", replace=True)


@pytest.mark.parametrize("max_own", [1, 2])
def test_one_more_than_have_a_place_at_most(max_own: int) -> None:
    for seed in range(8):
        memory = Memory()
        slots = Slots(memory, max_slots=4, max_own=max_own)
        for number in range(5):
            slots.register(f"{number}", f"{number}")
        crowd = Crowd(slots, random.Random(seed))
        for _ in range(300):
            crowd.act()
        assert memory.num_reads > 20 and crowd.num_entered > 10
        assert memory.most <= max_own + 1, f"seed {seed}"
