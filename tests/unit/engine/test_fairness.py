"""Tenants share computed tokens by weight, whatever one of them asks for."""

import pytest

from ftray.engine.api import Request, Sampling
from ftray.engine.pace import Pace
from ftray.engine.scheduler import Scheduler


class Endpoint:
    """A scheduler whose steps take no time and whose tenants always have so many requests waiting."""

    def __init__(self, waiting: dict[str, int], weights: dict[str, float], **sizes: int) -> None:
        self.scheduler = Scheduler(
            **{
                "max_num_seqs": 8,
                "max_batch_tokens": 64,
                "num_blocks": 400,
                "block_size": 4,
                "max_length": 400,
            }
            | sizes
        )
        self.waiting, self.weights = waiting, weights
        self.computed = dict.fromkeys(waiting, 0)
        self.reached: dict[str, int] = {}
        self.asked = 0

    def refill(self) -> None:
        live = [seq.request.tenant for seq in self.scheduler.sequences()]
        for tenant, count in self.waiting.items():
            for _ in range(count - live.count(tenant)):
                self.ask(tenant)

    def ask(self, tenant: str) -> str:
        self.asked += 1
        # The flood's requests are long in every way.
        prompt, new = (40, 60) if tenant == "flood" else (10, 20)
        self.scheduler.add(
            Request(
                id=str(self.asked),
                prompt_ids=[7] * prompt,
                sampling=Sampling(max_tokens=new),
                tenant=tenant,
                weight=self.weights.get(tenant, 1.0),
            )
        )
        return str(self.asked)

    def step(self) -> list[str]:
        """Returns the requests that got a token."""
        rows = self.scheduler.schedule()
        self.scheduler.advance(rows)
        gained = []
        for row in rows:
            # What is computed again after a preemption serves nobody.
            done = self.reached.get(row.seq.request.id, 0)
            self.reached[row.seq.request.id] = max(done, row.seq.computed)
            self.computed[row.seq.request.tenant] += max(0, row.seq.computed - done)
            if row.seq.computed == len(row.seq.tokens):
                gained.append(row.seq.request.id)
                row.seq.tokens.append(0)
                if row.seq.num_generated >= row.seq.request.sampling.max_tokens:
                    self.scheduler.finish(row.seq)
        return gained

    def run(self, steps: int) -> dict[str, float]:
        """Each tenant's share of the tokens computed."""
        for _ in range(steps):
            self.refill()
            self.step()
        total = sum(self.computed.values())
        return {tenant: count / total for tenant, count in self.computed.items()}


@pytest.mark.parametrize(
    ("weights", "expected"), [({}, 0.5), ({"victim": 3.0}, 0.75), ({"flood": 3.0}, 0.25)]
)
@pytest.mark.parametrize("num_blocks", [400, 80])
def test_a_flood_of_32_to_1_leaves_the_victim_its_share(
    weights: dict[str, float], expected: float, num_blocks: int
) -> None:
    endpoint = Endpoint({"flood": 256, "victim": 8}, weights, num_blocks=num_blocks)
    share = endpoint.run(3000)["victim"]
    assert abs(share - expected) <= 0.1 * expected


def test_shares_of_many_tenants_follow_their_weights() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    shares = Endpoint(dict.fromkeys(weights, 16), weights).run(4000)
    for tenant, weight in weights.items():
        assert abs(shares[tenant] - weight / 7) <= 0.1 * weight / 7


def test_idling_saves_nothing_up() -> None:
    endpoint = Endpoint({"early": 16, "late": 0}, {})
    endpoint.run(1000)
    endpoint.waiting["late"] = 16
    endpoint.computed = dict.fromkeys(endpoint.computed, 0)
    assert abs(endpoint.run(1500)["late"] - 0.5) <= 0.05


def test_leaving_for_a_moment_does_not_clear_a_debt() -> None:
    """A tenant that was served while another waited for rows does not start level by cancelling everything."""
    endpoint = Endpoint({"flood": 64, "victim": 8}, {})
    endpoint.run(200)
    before = endpoint.scheduler.shares.served("flood")
    for seq in [seq for seq in endpoint.scheduler.sequences() if seq.request.tenant == "flood"]:
        endpoint.scheduler.finish(seq)
    endpoint.ask("flood")
    assert endpoint.scheduler.shares.served("flood") >= min(
        before, endpoint.scheduler.shares.served("victim")
    )


def test_accounts_of_those_who_left_are_forgotten() -> None:
    endpoint = Endpoint({}, {})
    for number in range(500):
        endpoint.computed[f"t{number}"] = 0
        endpoint.ask(f"t{number}")
        while endpoint.scheduler.sequences():
            endpoint.step()
    assert not endpoint.scheduler.shares._accounts


def test_a_lone_request_beside_a_flood_is_next_when_a_row_is_free() -> None:
    endpoint = Endpoint({"flood": 256, "victim": 0}, {})
    endpoint.run(400)
    waits = []
    for _ in range(20):
        name, steps = endpoint.ask("victim"), 0
        while name not in endpoint.step():
            endpoint.refill()
            steps += 1
        waits.append(steps)
    # Eight rows of 60 tokens end about every eighth step, and its prompt is one chunk.
    assert sorted(waits)[len(waits) // 2] <= 60 // 8 * 2 + 2


def test_priority_orders_within_a_tenant_and_not_beyond() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_batch_tokens=64, num_blocks=64, block_size=4, max_length=100)

    def add(name: str, tenant: str, priority: int) -> None:
        sampling = Sampling(max_tokens=1)
        request = Request(id=name, prompt_ids=[7] * 10, sampling=sampling, tenant=tenant, priority=priority)
        scheduler.add(request)

    for name, tenant, priority in [("a0", "a", 0), ("a-9", "a", -9), ("b5", "b", 5), ("a1", "a", 1)]:
        add(name, tenant, priority)
    order = []
    while scheduler.sequences():
        (row,) = scheduler.schedule()
        scheduler.advance([row])
        order.append(row.seq.request.id)
        scheduler.finish(row.seq)
    assert order == ["a-9", "b5", "a0", "a1"]


def test_a_tenant_without_a_row_takes_one_of_many_at_once() -> None:
    """Answers of a flood that began together end together: nobody is to wait until they do."""
    endpoint = Endpoint({"flood": 8, "victim": 0}, {})
    endpoint.run(5)
    name = endpoint.ask("victim")
    assert name in endpoint.step()
    assert endpoint.scheduler.num_preempted == 1
    # One row is what it gets so: with it, it is one of those that take turns.
    endpoint.ask("victim")
    endpoint.step()
    assert endpoint.scheduler.num_preempted == 1


@pytest.mark.parametrize("tenants", [8, 12])
def test_no_row_is_taken_from_a_tenant_that_has_no_more_than_its_share(tenants: int) -> None:
    endpoint = Endpoint({f"t{number}": 1 for number in range(tenants)}, {})
    endpoint.run(400)
    assert endpoint.scheduler.num_preempted == 0


def test_prompts_are_held_back_beside_answers_by_their_tenants_weights() -> None:
    pace = Pace(prompt_share=0.35)
    scheduler = Scheduler(
        max_num_seqs=9, max_batch_tokens=900, num_blocks=800, block_size=4, max_length=400, pace=pace
    )

    def add(name: str, tenant: str, prompt: int) -> None:
        sampling = Sampling(max_tokens=100)
        scheduler.add(Request(id=name, prompt_ids=[7] * prompt, sampling=sampling, tenant=tenant))

    def prompt_tokens() -> int:
        """A step of 10 ms and 0.1 ms for each token beyond one a row."""
        rows = scheduler.schedule()
        extra = sum(row.length - 1 for row in rows)
        pace.note(extra, 0.01 + 0.0001 * extra)
        scheduler.advance(rows)
        for row in rows:
            if row.seq.computed == len(row.seq.tokens):
                row.seq.tokens.append(0)
        return extra

    add("a", "flood", 100)
    assert prompt_tokens() == 99  # nobody is held up
    for _ in range(5):
        assert prompt_tokens() == 0
    for name in "bcdefg":
        add(name, "flood", 200)
    add("v", "victim", 200)
    # The victim's row is due as much as the flood's seven, of which one decodes: ((1 + 6 / 7) / (1 / 7))**2 steps.
    assert prompt_tokens() == 892
    while prompt_tokens():
        pass
    add("h", "flood", 50)
    assert prompt_tokens() in (34, 35)  # as seven answers decode, with the victim's: 0.35 steps


def test_a_pace_learns_what_steps_and_tokens_take() -> None:
    pace = Pace(prompt_share=0.3)
    assert pace.prompt_tokens(0.0) == float("inf")
    for extra in (0, 0, 50, 0, 10):
        pace.note(extra, 0.02 + 0.0001 * extra)
    assert pace.step_s == pytest.approx(0.02)
    assert pace.prompt_tokens(0.0) == pytest.approx(0.3 * 0.02 / 0.0001)
    assert pace.prompt_tokens(2.0) == pytest.approx(4 * 0.02 / 0.0001)
    for _ in range(100):  # nothing but equal steps, on a machine half as fast
        pace.note(12, 0.042)
    assert pace.step_s == pytest.approx(0.042 - 12 * 0.0001, rel=0.05)


@pytest.mark.parametrize("warm", [True, False], ids=["later", "first"])
def test_a_slow_step_does_not_hold_prompts_back_for_long(warm: bool) -> None:
    """Steps of 20 ms and 0.1 ms a token, but for one that something held up for a second."""
    pace = Pace(prompt_share=0.3)
    for extra in (0, 100, 0, 300, *[0] * 100) if warm else ():
        pace.note(extra, 0.02 + 0.0001 * extra)
    pace.note(19, 1.0)
    for _ in range(0 if warm else 300):
        pace.note(0, 0.02)
    steps, left = 0, 2000
    while left > 0 and steps <= 70:
        extra = int(min(left, pace.prompt_tokens(1 / 17)))
        pace.note(extra, 0.02 + 0.0001 * extra)
        steps, left = steps + 1, left - extra
    # 60 tokens a step are allowed, so 34 steps would do.
    assert left <= 0
