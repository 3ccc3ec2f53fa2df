"""Residency: what the slots of a tier hold, whatever is asked of it in whatever order."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from localr1.errors import MemoryLimitError
from localr1.experts.policy import RANKINGS, Lru, StaticPopularity, make_ranking
from localr1.experts.residency import ABSENT, Promotion, Residency

LAYERS, EXPERTS = 3, 6


class ResidencyMachine(RuleBasedStateMachine):
    """Everything a store may do, in any order, beside a plain model of who holds which slot."""

    @initialize(
        name=st.sampled_from(RANKINGS),
        slots=st.integers(0, 20),
        cap=st.integers(0, 4),
        floor=st.sampled_from([0.0, 0.5, 1.0]),
        exact=st.booleans(),
    )
    def begin(self, name: str, slots: int, cap: int, floor: float, exact: bool) -> None:
        self.residency = Residency(
            LAYERS,
            EXPERTS,
            slots,
            make_ranking(name, LAYERS, EXPERTS),
            insert_cap=cap,
            break_even=0.0,
            layer_floor=floor,
            exact=exact,
        )
        self.cap = cap
        self.holder: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.flying: list[Promotion] = []

    def held(self) -> list[int]:
        return sorted(self.holder.values())

    def flying_keys(self) -> list[int]:
        return [each.layer * EXPERTS + each.expert for each in self.flying]

    def lose(self, key: int | None) -> None:
        if key is not None:
            assert not self.pins.get(key), "a pinned expert was evicted"
            slot = next(slot for slot, holder in self.holder.items() if holder == key)
            del self.holder[slot]

    @rule(data=st.data())
    def run_a_pass(self, data: st.DataObject) -> None:
        for layer in range(LAYERS):
            chosen = data.draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3))
            self.residency.ranking.observe(layer, np.array(sorted(chosen)))
        self.residency.ranking.tick()

    @rule(key=st.integers(0, LAYERS * EXPERTS - 1))
    def demand(self, key: int) -> None:
        if key in self.holder.values() or key in self.flying_keys():
            return
        full = len(self.holder) + len(self.flying) == self.residency.num_slots
        stuck = full and all(self.pins.get(each) for each in self.held())
        if stuck:
            with pytest.raises(MemoryLimitError, match="slots of their tier"):
                self.residency.demand(*divmod(key, EXPERTS))
            return
        slot, evicted = self.residency.demand(*divmod(key, EXPERTS))
        assert (evicted is not None) == full, "it evicts only where nothing is free"
        self.lose(evicted)
        assert slot not in self.holder
        assert slot not in [each.slot for each in self.flying]
        self.holder[slot] = key

    @rule()
    def promote(self) -> None:
        before = len(self.flying)
        promotions = self.residency.promotions()
        assert len(promotions) <= max(self.cap - before, 0)
        self.reserve(promotions)

    @rule(limit=st.none() | st.integers(0, 5))
    def warm_start(self, limit: int | None) -> None:
        free = self.residency.num_slots - len(self.holder) - len(self.flying)
        promotions = self.residency.warm_start(limit)
        wanted = free if limit is None else min(free, limit)
        absent = LAYERS * EXPERTS - len(self.holder) - len(self.flying)
        assert len(promotions) == min(wanted, absent)
        self.reserve(promotions)

    def reserve(self, promotions: list[Promotion]) -> None:
        for promotion in promotions:
            self.lose(promotion.evicted_key)
            key = promotion.layer * EXPERTS + promotion.expert
            assert key not in self.holder.values()
            assert key not in self.flying_keys()
            assert promotion.slot not in self.holder
            assert promotion.slot not in [each.slot for each in self.flying]
            self.flying.append(promotion)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), done=st.booleans())
    def land(self, data: st.DataObject, done: bool) -> None:
        promotion = data.draw(st.sampled_from(self.flying))
        self.flying.remove(promotion)
        if done:
            self.residency.complete(promotion)
            self.holder[promotion.slot] = promotion.layer * EXPERTS + promotion.expert
        else:
            self.residency.cancel(promotion)

    @precondition(lambda self: self.holder)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.held()))
        self.residency.pin(*divmod(key, EXPERTS))
        self.pins[key] = self.pins.get(key, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, count in self.pins.items() if count)))
        self.residency.unpin(*divmod(key, EXPERTS))
        self.pins[key] -= 1

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        loose = [key for key in self.held() if not self.pins.get(key)]
        if loose:
            key = data.draw(st.sampled_from(loose))
            self.residency.remove(*divmod(key, EXPERTS))
            self.lose(key)

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        busy = [slot for slot, key in self.holder.items() if self.pins.get(key)]
        busy += [each.slot for each in self.flying]
        least = max(busy, default=-1) + 1
        slots = data.draw(st.integers(least, self.residency.num_slots))
        lost = self.residency.shrink(slots)
        gone = {key for slot, key in self.holder.items() if slot >= slots}
        assert set(lost) == gone
        assert len(lost) == len(gone)
        for key in lost:
            self.lose(key)
        assert self.residency.num_slots == slots

    @rule(more=st.integers(0, 5))
    def grow(self, more: int) -> None:
        self.residency.grow(self.residency.num_slots + more)

    @invariant()
    def agrees(self) -> None:
        expected = np.full(LAYERS * EXPERTS, ABSENT)
        for slot, key in self.holder.items():
            expected[key] = slot
        assert np.array_equal(self.residency.slot_of.reshape(-1), expected)
        assert sorted(self.residency.resident_keys.tolist()) == self.held()
        assert self.residency.num_resident == len(self.holder)
        assert self.residency.num_in_flight == len(self.flying)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_warm_start_without_knowledge_deals_to_the_layers_in_turn() -> None:
    residency = Residency(LAYERS, EXPERTS, 8, Lru(LAYERS, EXPERTS), insert_cap=1)
    promotions = residency.warm_start()
    assert [(each.layer, each.expert) for each in promotions] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2),
    ]  # fmt: skip


def test_warm_start_takes_the_best_and_gives_each_layer_its_floor() -> None:
    popularity = np.zeros((LAYERS, EXPERTS))
    popularity[0] = [9, 8, 7, 6, 5, 4]
    popularity[2, 3] = 1
    ranking = StaticPopularity(LAYERS, EXPERTS, popularity)
    residency = Residency(LAYERS, EXPERTS, 6, ranking, insert_cap=1, layer_floor=0.5)
    chosen = [(each.layer, each.expert) for each in residency.warm_start()]
    assert sorted(chosen) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 3)]


def test_a_layer_keeps_its_floor() -> None:
    ranking = Lru(2, EXPERTS)
    residency = Residency(2, EXPERTS, 4, ranking, insert_cap=1, layer_floor=0.5)
    for layer, expert in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        ranking.observe(layer, np.array([expert]))
        residency.demand(layer, expert)
    for expert in range(2, 6):
        ranking.observe(1, np.array([expert]))
        residency.demand(1, expert)
    # The oldest of all, 0 of layer 0, went first; the other stays, older than any of layer 1.
    assert (residency.slot_of[0] != ABSENT).tolist() == [False, True, False, False, False, False]
    assert (residency.slot_of[1] != ABSENT).sum() == 3


def test_a_gain_below_the_break_even_does_not_pay() -> None:
    ranking = StaticPopularity(1, EXPERTS, np.array([[1.0, 2.0, 3.0, 4.5, 5.0, 9.0]]))
    ranking.horizon = 8.0
    residency = Residency(1, EXPERTS, 3, ranking, insert_cap=2, break_even=20.0)
    for expert in (0, 2, 3):
        residency.demand(0, expert)
    ranking.observe(0, np.array([4, 5]))
    ranking.tick()
    # 5 for 0 gains 64 uses; 4 would take the place of 2 and gain 16.
    assert [(each.expert, each.evicted_key) for each in residency.promotions()] == [(5, 0)]


def test_who_was_removed_is_not_evicted_again() -> None:
    ranking = Lru(1, EXPERTS)
    residency = Residency(1, EXPERTS, 3, ranking, insert_cap=0)
    for expert in (0, 1, 2):
        ranking.observe(0, np.array([expert]))
        residency.demand(0, expert)
    ranking.observe(0, np.array([3, 4, 5]))
    assert residency.demand(0, 3)[1] == 0
    residency.remove(0, 1)
    assert residency.demand(0, 4)[1] is None
    assert residency.demand(0, 5)[1] == 2


def test_promotions_are_the_best_that_pay() -> None:
    popularity = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    ranking = StaticPopularity(1, EXPERTS, popularity)
    ranking.horizon = 1.0
    residency = Residency(1, EXPERTS, 3, ranking, insert_cap=2, break_even=1.5)
    for expert in (0, 1, 3):
        residency.demand(0, expert)
    ranking.observe(0, np.array([2, 4, 5]))
    ranking.tick()
    begun = residency.promotions()
    # 5 for 0 gains 5 uses; 4 for 1 gains 3; 2 would gain less than 1.5, and the cap is two.
    assert [(each.expert, each.evicted_key) for each in begun] == [(5, 0), (4, 1)]
    assert residency.promotions() == [], "none while as many as the cap are in flight"
    assert not residency.is_resident(0, 5), "not there before its copy is done"
    for promotion in begun:
        residency.complete(promotion)
    assert residency.is_resident(0, 5)
    ranking.observe(0, np.array([1, 2]))
    ranking.tick()
    assert residency.promotions() == [], "2 in the place of 3 gains nothing"


def test_there_is_room_for_what_is_worth_more_than_the_least() -> None:
    ranking = Lru(1, 6)
    residency = Residency(1, 6, 2, ranking, insert_cap=0)
    assert residency.has_room_for(0, -1.0), "a slot is free"
    for expert in (4, 1, 2):  # Scores 1, 2 and 3.
        ranking.observe(0, np.array([expert]))
        ranking.tick()
    residency.demand(0, 1)
    residency.demand(0, 2)
    assert not residency.has_room_for(0, 2.0)
    assert residency.has_room_for(0, 2.5)
    assert residency.demand(0, 4)[1] == 1, "to ask changed nothing"
    residency.pin(0, 4)
    residency.pin(0, 2)
    assert not residency.has_room_for(0, 9.0)
