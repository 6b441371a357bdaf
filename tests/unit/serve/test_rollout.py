"""New versions take over when every engine has them, and never before; bad ones never do."""

import asyncio
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.config.serve import ServeConfig
from ftray.engine.fake import FakeEngineConfig
from ftray.serve.backend import ServedModel
from ftray.serve.control import Control
from ftray.serve.front import Front, View
from ftray.serve.rollout import Report, Rollout

BASE = ServedModel(id="base", ref="tiny", digest="base", is_base=True)


def version(number: int, id: str = "a@prod") -> ServedModel:
    return ServedModel(id=id, ref=f"a@{number}", digest=f"d{number}")


@dataclass
class Scene:
    """A rollout with a clock of its own, and members that do what they are told."""

    now: float = 0.0
    fronts: dict[str, Front] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rollout = Rollout(BASE, member_s=5.0, clock=lambda: self.now)

    def engine(self, name: str, *loaded: int, failed: dict[int, str] | None = None) -> list[str]:
        """An engine reports; returns the digests it is to hold."""
        problems = {f"d{number}": why for number, why in (failed or {}).items()}
        digests = frozenset(f"d{number}" for number in loaded)
        self.rollout.hear(Report(member=name, is_engine=True, loaded=digests, failed=problems))
        return sorted(model.digest for model in self.rollout.to_hold())

    def front(self, name: str) -> dict[str, str]:
        """A front reports and takes over the view; returns what it offers."""
        front = self.fronts.setdefault(name, Front(View(models=[])))
        self.rollout.hear(Report(member=name, is_engine=False, in_use=front.in_use()))
        if models := self.rollout.offered():
            front.update(View(models=models, pending=self.rollout.pending()))
        return {model.id: model.digest for model in front.view.models}


def test_a_version_is_live_once_every_engine_has_it() -> None:
    scene = Scene()
    scene.rollout.want([version(1)])
    assert scene.front("f") == {}
    assert scene.engine("x") == ["d1"]
    assert scene.front("f") == {"base": "base"}
    scene.engine("x", 1)
    assert scene.front("f") == {"base": "base", "a@prod": "d1"}
    scene.engine("y", 1)
    scene.rollout.want([version(2)])
    assert scene.engine("x", 1, 2) == ["d1", "d2"]
    assert scene.front("f")["a@prod"] == "d1"  # the other engine has it not yet
    scene.engine("y", 1, 2)
    assert scene.front("f")["a@prod"] == "d2"


def test_the_old_version_is_held_until_no_front_needs_it() -> None:
    scene = Scene()
    scene.rollout.want([version(1)])
    scene.engine("x", 1)
    scene.front("f")
    scene.fronts["f"].in_flight[version(1)] += 1
    scene.rollout.want([version(2)])
    scene.engine("x", 1, 2)
    scene.front("f")  # switches, with a request in flight under the old one
    scene.front("f")
    assert scene.engine("x", 1, 2) == ["d1", "d2"]
    del scene.fronts["f"].in_flight[version(1)]
    scene.front("f")
    assert scene.engine("x", 1, 2) == ["d2"]


def test_a_bad_version_is_rejected_and_the_old_one_goes_on() -> None:
    scene = Scene()
    scene.rollout.want([version(1)])
    scene.engine("x", 1)
    scene.rollout.want([version(2)])
    assert scene.engine("x", 1, failed={2: "NaN"}) == ["d1"]
    assert scene.front("f")["a@prod"] == "d1"
    assert scene.rollout.rejected == {"d2": "NaN"}
    scene.rollout.want([version(3)])
    assert scene.rollout.rejected == {}
    scene.engine("x", 1, 3)
    assert scene.front("f")["a@prod"] == "d3"


def test_a_dead_engine_does_not_hold_up_the_others_for_long() -> None:
    scene = Scene()
    scene.rollout.want([version(1)])
    scene.engine("x", 1)
    scene.engine("y", 1)
    scene.rollout.want([version(2)])
    scene.now = 4
    scene.engine("x", 1, 2)
    assert scene.front("f")["a@prod"] == "d1"
    scene.now = 6
    scene.engine("x", 1, 2)
    assert scene.front("f")["a@prod"] == "d2"


def test_a_version_that_is_live_is_not_rejected_by_a_new_engine() -> None:
    scene = Scene()
    scene.rollout.want([version(1)])
    scene.engine("x", 1)
    scene.engine("y", failed={1: "disk"})
    assert scene.rollout.rejected == {}
    assert scene.front("f")["a@prod"] == "d1"


def test_what_is_wanted_no_longer_goes() -> None:
    scene = Scene()
    scene.rollout.want([version(1), version(2, "a")])
    scene.engine("x", 1, 2)
    assert set(scene.front("f")) == {"base", "a@prod", "a"}
    scene.rollout.want([version(1)])
    assert set(scene.front("f")) == {"base", "a@prod"}
    scene.front("f")
    assert scene.engine("x", 1, 2) == ["d1"]


def test_a_new_control_forgets_nothing_that_matters() -> None:
    """It starts empty while the registry has moved on; the fronts go on with what they had."""
    scene = Scene()
    scene.rollout.want([version(1)])
    scene.engine("x", 1)
    scene.front("f")
    scene.rollout = Rollout(BASE, member_s=5.0, clock=lambda: scene.now)
    scene.rollout.want([version(2)])
    assert scene.front("f") == {"base": "base", "a@prod": "d1"}
    assert scene.engine("x", 1) == ["d1", "d2"]  # the old one is still offered by the front
    assert scene.front("f") == {"base": "base", "a@prod": "d1"}
    scene.engine("x", 1, 2)
    assert scene.front("f") == {"base": "base", "a@prod": "d2"}


def test_a_front_keeps_what_it_knows_of_pending_ids_alone() -> None:
    front = Front(View(models=[BASE, version(1), version(1, "b")]))
    front.update(View(models=[BASE], pending=frozenset({"a@prod"})))
    assert [model.id for model in front.view.models] == ["base", "a@prod"]
    view: Any = View(models=[BASE])
    front.update(view)
    assert [model.id for model in front.view.models] == ["base"]


def test_a_control_that_takes_over_knows_what_was_decided(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"deltas": ["a@prod"], "tenants_file": str(tmp_path / "tenants.json")}
    config = ServeConfig(base="tiny", engine=FakeEngineConfig(), **fields)

    def started(run: str) -> Control:
        return Control(config, BASE, lambda ref: [version(1 if ref == "a@prod" else 2, ref)], run)

    async def decide() -> None:
        control = started("first")
        await control.load("b@1")
        await control.unload("a@prod")
        control.sync(Report(member="x", is_engine=True, failed={"d2": "NaN"}))
        assert control.rollout.rejected == {"d2": "NaN"}
        control.drain()
        await control.look()

    asyncio.run(decide())
    again, other = started("first"), started("second")
    assert (again.refs, again.draining, again.rollout.rejected) == (["b@1"], True, {"d2": "NaN"})
    assert (other.refs, other.draining, other.rollout.rejected) == (["a@prod"], False, {})
    (kept,) = tmp_path.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.write_text("{")
    assert started("first").refs == ["a@prod"]
