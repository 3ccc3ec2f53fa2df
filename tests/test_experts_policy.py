"""The rankings: each against a plain replay, and all against each other."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localr1.errors import UsageError
from localr1.experts.adaptive import HALF_LIVES, MAX_AGE, RECENCY, TIE, Adaptive
from localr1.experts.batched import Floats, Keys
from localr1.experts.choices import PassChoices
from localr1.experts.policy import (
    RANKINGS,
    Belady,
    Lfu,
    Lru,
    Ranking,
    StaticPopularity,
    make_ranking,
)
from localr1.experts.replay import replay_demand, replay_promotion
from localr1.experts.residency import Promotion, Residency
from localr1.experts.statistics import routing_statistics
from localr1.experts.trace import Trace, read_trace

NANO = Path(__file__).parent / "data" / "r1-nano-trace.safetensors"
"""`localr1 trace r1-nano` over 24 questions of `localr1 eval arithmetic`."""
BUDGETS = (0.06, 0.125, 0.25, 0.40, 0.50, 0.60, 0.75)


def random_trace(seed: int, tokens: int, layers: int, experts: int, per_token: int) -> Trace:
    """Choices whose experts differ in popularity, with runs of the same ones."""
    generator = np.random.default_rng(seed)
    appeal = generator.normal(size=(layers, experts))
    chosen = np.empty((tokens, layers, per_token), np.uint8)
    mood = np.zeros((layers, experts))
    for token in range(tokens):
        mood = 0.8 * mood + generator.normal(size=mood.shape)
        chosen[token] = np.argsort(-(appeal + mood), axis=1)[:, :per_token]
    lengths = np.array([[tokens, 0]], np.int32)
    return Trace(chosen, lengths, tuple(range(layers)), experts, "random")


def residency_of(ranking: Ranking, trace: Trace, slots: int, **options: float) -> Residency:
    layers = trace.experts.shape[1]
    return Residency(
        layers,
        trace.num_experts,
        slots,
        ranking,
        insert_cap=int(options.get("insert_cap", 4)),
        break_even=0.0,
        layer_floor=options.get("layer_floor", 0.0),
        exact=isinstance(ranking, Belady),
    )


def slots_of(trace: Trace, share: float) -> int:
    """At least what one token needs of a layer."""
    count = trace.experts.shape[1] * trace.num_experts
    return max(trace.experts_per_token, int(share * count + 1e-9))


@pytest.mark.parametrize("seed", range(3))
def test_lru_hits_what_the_reuse_distances_say(seed: int) -> None:
    trace = random_trace(seed, 60, 2, 9, 3)
    rates = routing_statistics(trace).hit_rates
    for layer in range(2):
        # Distances are counted choice by choice, so a pass is one here.
        single = trace.experts[:, layer].reshape(-1, 1, 1)
        one = Trace(single, np.array([[len(single), 0]], np.int32), (layer,), 9, "")
        for slots in range(1, 10):
            hits = replay_demand(one, residency_of(Lru(1, 9), one, slots))
            assert hits == round(rates[layer, slots] * len(single))


def plain_replay(trace: Trace, slots: int, worth: Callable[[int, NDArray[np.int64]], float]) -> int:
    """Hits of one layer's cache. worth(expert, history): history is all choices so far, the running
    token's included."""
    cache: set[int] = set()
    hits = 0
    for token in range(trace.num_tokens):
        chosen = trace.experts[token, 0].tolist()
        history = trace.experts[: token + 1, 0].reshape(-1).astype(np.int64)
        present = set(chosen) & cache
        hits += len(present)
        pinned = set(present)
        for expert in chosen:
            if expert in present:
                continue
            if len(cache) == slots:
                cache.remove(min(cache - pinned, key=lambda each: worth(each, history)))
            cache.add(expert)
            pinned.add(expert)
    return hits


def last_use(expert: int, history: NDArray[np.int64]) -> float:
    return float(np.flatnonzero(history == expert)[-1])


@given(st.integers(0, 1000), st.integers(3, 12))
@settings(max_examples=25, deadline=None)
def test_lru_is_the_plain_one(seed: int, slots: int) -> None:
    trace = random_trace(seed, 40, 1, 12, 3)
    found = replay_demand(trace, residency_of(Lru(1, 12), trace, slots))
    assert found == plain_replay(trace, slots, last_use)


@given(st.integers(0, 1000), st.sampled_from([(3, 12), (8, 12), (40, 96), (80, 96)]))
@settings(max_examples=15, deadline=None)
def test_lfu_keeps_the_most_used(seed: int, sizes: tuple[int, int]) -> None:
    slots, num_experts = sizes
    trace = random_trace(seed, 5 * num_experts, 1, num_experts, 3)
    ranking = Lfu(1, num_experts)
    residency = residency_of(ranking, trace, slots)
    counts = np.zeros(num_experts)
    for token in trace.experts[:, 0].astype(np.int64):
        ranking.observe(0, token)
        counts[token] += 1
        pinned: set[int] = set()
        for expert in token.tolist():
            if not residency.is_resident(0, expert):
                held = residency.resident_keys.tolist()
                _, evicted = residency.demand(0, expert)
                assert (evicted is None) == (len(held) < slots)
                if evicted is not None:
                    assert counts[evicted] == min(counts[each] for each in set(held) - pinned)
            residency.pin(0, expert)
            pinned.add(expert)
        for expert in token.tolist():
            residency.unpin(0, expert)
        ranking.tick()
        assert ranking.scores.tolist() == [counts.tolist()]


@pytest.mark.parametrize("name", ["lru", "adaptive"])
@pytest.mark.parametrize(
    ("layers", "experts", "per_token", "slots"), [(2, 100, 8, 60), (16, 250, 20, 1600)]
)
def test_a_list_of_victims_evicts_whom_a_look_at_all_would(
    layers: int, experts: int, per_token: int, slots: int, name: str
) -> None:
    """More are held than are listed, and of the largest tier the list serves several passes: by age
    it must not matter, and for scores that fall by themselves hardly."""
    trace = random_trace(0, 100, layers, experts, per_token)
    listed, exact = (
        replay_demand(
            trace,
            Residency(
                layers,
                experts,
                slots,
                make_ranking(name, layers, experts),
                insert_cap=0,
                layer_floor=0.0,
                exact=exact,
            ),
        )
        for exact in (False, True)
    )
    assert listed == (exact if name == "lru" else pytest.approx(exact, rel=0.01))


@given(st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(max_examples=15, deadline=None)
def test_nobody_hits_more_than_the_oracle(seed: int, share: float) -> None:
    trace = random_trace(seed, 40, 3, 10, 2)
    slots = slots_of(trace, share)
    oracle = replay_demand(trace, residency_of(Belady(trace), trace, slots))
    for name in RANKINGS:
        ranking = make_ranking(name, 3, 10)
        assert replay_demand(trace, residency_of(ranking, trace, slots)) <= oracle, name


@pytest.mark.parametrize("style", ["demand", "promotion"])
@pytest.mark.parametrize("share", BUDGETS)
def test_adaptive_is_at_or_above_lru_and_lfu(share: float, style: str) -> None:
    trace = read_trace(NANO)
    layers = trace.experts.shape[1]
    hits = {}
    for name in RANKINGS:
        ranking = make_ranking(name, layers, trace.num_experts)
        residency = residency_of(ranking, trace, slots_of(trace, share), layer_floor=0.5)
        if style == "demand":
            hits[name] = replay_demand(trace, residency)
        else:
            hits[name], _ = replay_promotion(trace, residency)
    assert hits["adaptive"] >= max(hits["lru"], hits["lfu"]), hits


def test_adaptive_scores_are_uses_to_come() -> None:
    # Expert 0 is used by every token, 1 by one in four, 2 never.
    ranking = Adaptive(1, 3)
    for used in np.random.default_rng(0).random(800) < 0.25:
        ranking.observe(0, np.array([0, 1] if used else [0]))
        ranking.tick()
    assert ranking.scores[0] == pytest.approx([1.0, 0.25, 0.0], abs=0.1)


def test_adaptive_learns_what_recency_is_worth() -> None:
    """In a loop the last one used is the last that comes again; in runs it is the next."""
    loop, runs = Adaptive(1, 32), Adaptive(1, 32)
    for token in range(1600):
        loop.observe(0, np.array([token % 32]))
        runs.observe(0, np.array([token // 16 % 32]))
        for ranking in (loop, runs):
            ranking.tick()
    last_in_loop, last_in_runs = (1600 - 1) % 32, (1600 - 1) // 16 % 32
    assert loop.scores[0, last_in_loop] < np.median(loop.scores[0])
    assert runs.scores[0].argmax() == last_in_runs


def test_adaptive_forgets_nothing_by_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(0, 400, 2, 8, 2)
    plain, rescaled = Adaptive(2, 8), Adaptive(2, 8)
    for token in trace.experts.astype(np.int64):
        for ranking, limit in ((plain, 1e20), (rescaled, 1e3)):
            monkeypatch.setattr("localr1.experts.adaptive.RESCALE", limit)
            for layer in range(2):
                ranking.observe(layer, token[layer])
            ranking.tick()
    assert rescaled.scores == pytest.approx(plain.scores, rel=1e-4)


@pytest.mark.parametrize("name", RANKINGS)
def test_a_prefill_pass_counts_its_tokens(name: str) -> None:
    ranking = make_ranking(name, 2, 4)
    ranking.observe(0, np.array([0, 1, 3]), np.array([9.0, 1.0, 2.0]))
    ranking.observe(1, np.array([2]), np.array([12.0]))
    ranking.tick(12)
    scores = ranking.scores
    assert ranking.chosen.tolist() == [0, 1, 3, 6]
    assert scores[1].argmax() == 2
    if name != "lru":
        assert scores[0, 0] > scores[0, 3] > scores[0, 1] > scores[0, 2]
    assert np.array_equal(ranking.score(np.array([6, 0])), scores.reshape(-1)[[6, 0]])


def test_a_prompt_does_not_wipe_out_what_was_before() -> None:
    ranking = Adaptive(1, 4)
    for _ in range(100):
        ranking.observe(0, np.array([0]))
        ranking.tick()
    ranking.observe(0, np.array([2, 3]), np.array([15.0, 5.0]))
    ranking.tick(20)
    scores = ranking.scores[0]
    assert scores[0] > scores[1]
    assert scores[2] > scores[3] > scores[1]
    assert scores[0] > scores[3], "100 uses and none of the last 20, against 5 of them"


@pytest.mark.parametrize("name", RANKINGS)
def test_the_running_pass_is_scored_too(name: str) -> None:
    """A store asks for room in the middle of a pass: what it just chose must not make it."""
    ranking = make_ranking(name, 2, 4)
    for _ in range(3):
        for layer in range(2):
            ranking.observe(layer, np.array([0, 1]))
        ranking.tick()
    before = ranking.scores
    ranking.observe(0, np.array([3]))
    if name != "static":
        assert ranking.scores[0, 3] > before[0, 3]
    ranking.observe(1, np.array([2]))
    ranking.tick()
    assert ranking.chosen.tolist() == [3, 6]


def told_one_by_one(ranking: Ranking) -> None:
    """Of every layer by itself, in the place of all at once."""

    def observe_layers(first: int, rows: Sequence[Keys]) -> None:
        for layer, row in enumerate(rows, first):
            ranking.observe(layer, row)

    ranking.observe_layers = observe_layers  # type: ignore[method-assign]


class PlainAdaptive(Adaptive):
    """Its arithmetic as its docstring has it: what was rearranged for speed keeps every bit."""

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        before = self._sums.copy()
        super()._end_pass(keys, weights, tokens)
        if tokens == 1 and weights is None and self._scale.max() > 1.0:
            before[keys] += self._scale
            assert np.array_equal(self._sums, before)

    def _score(self, keys: Keys | None) -> Floats:
        all_keys = np.arange(self.num_keys) if keys is None else keys
        age = np.minimum(self.passes - self.last_pass[all_keys], MAX_AGE)
        assert self._sums.shape[1] == len(HALF_LIVES)
        expected = self._by_age[age] + self._sums[all_keys] @ self._by_sum
        by_recency = RECENCY[age] * (self._rare + TIE * expected)
        scores: Floats = np.where(expected < self._rare, by_recency, expected)
        return scores


class PlainResidency(Residency):
    """Without shortcuts, and with every decision on record."""

    def __init__(self, trace: Trace, slots: int, ranking: Ranking, insert_cap: int) -> None:
        layers = trace.experts.shape[1]
        super().__init__(layers, trace.num_experts, slots, ranking, insert_cap=insert_cap)
        self.decisions: list[tuple[int | None, ...]] = []

    @property
    def resident_keys(self) -> Keys:
        slots = self.slot_of.reshape(-1)
        held = np.flatnonzero(slots >= 0)
        resident: Keys = held[np.argsort(slots[held])]
        return resident

    def _take_over(self, victim: int, key: int) -> Promotion:
        self._evict(victim)
        promotion = self._in_flight[key] = self._reserve(key)._replace(evicted_key=victim)
        return promotion

    def demand(self, layer: int, expert: int) -> tuple[int, int | None]:
        slot, evicted = super().demand(layer, expert)
        self.decisions.append((layer, expert, slot, evicted))
        return slot, evicted

    def promotions(self) -> list[Promotion]:
        found = super().promotions()
        self.decisions += found
        return found


class RecordingResidency(PlainResidency):
    """As the store has it, on record."""

    resident_keys = Residency.resident_keys
    _take_over = Residency._take_over


@pytest.mark.parametrize("share", [0.06, 0.25, 0.75])
@pytest.mark.parametrize("name", RANKINGS)
def test_what_makes_it_fast_changes_no_decision(name: str, share: float) -> None:
    """Every expert that comes in, its slot, and who had it."""
    for trace in (read_trace(NANO), random_trace(3, 150, 6, 200, 6)):
        layers = trace.experts.shape[1]
        for insert_cap, replay in ((0, replay_demand), (4, replay_promotion)):
            decisions = []
            for is_plain in (False, True):
                ranking = make_ranking(name, layers, trace.num_experts)
                if is_plain:
                    if name == "adaptive":
                        ranking = PlainAdaptive(layers, trace.num_experts)
                    told_one_by_one(ranking)
                kind = PlainResidency if is_plain else RecordingResidency
                residency = kind(trace, slots_of(trace, share), ranking, insert_cap)
                for promotion in residency.warm_start():
                    residency.complete(promotion)
                replay(trace, residency)
                decisions.append(residency.decisions)
            assert decisions[0] == decisions[1]
            assert decisions[0]


def test_layers_told_at_once_are_those_that_were_told() -> None:
    """Also a part of them, and others after it."""
    ranking = Lru(4, 8)
    ranking.observe_layers(1, [np.array([3, 5]), np.array([0, 7])])
    assert ranking.last_pass.tolist().count(0) == 4
    ranking.observe(3, np.array([2]))
    version = ranking.version
    ranking.observe_layers(0, [np.array([1, 2, 6])])
    assert ranking.version != version
    ranking.tick(1)
    assert ranking.chosen.tolist() == [11, 13, 16, 23, 26, 1, 2, 6]


def test_a_store_tells_of_a_token_before_it_needs_room_and_of_all_in_the_end() -> None:
    ranking = Lru(3, 4)
    counts = np.zeros((3, 4), np.int64)
    choices = PassChoices(counts)
    assert choices.add(0, torch.tensor([[2, 0]])) == ([2, 0], [1, 1])
    choices.add(1, torch.tensor([[1, 3]]))
    choices.tell(ranking)
    assert ranking.score(np.arange(12)).nonzero()[0].tolist() == [0, 2, 5, 7]
    choices.add(2, torch.tensor([[3, 1]]))
    choices.tell(ranking)
    choices.tell(ranking)
    ranking.tick(1)
    assert ranking.chosen.tolist() == [2, 0, 5, 7, 11, 9]
    assert choices.add(1, torch.tensor([[1, 3], [3, 0]])) == ([0, 1, 3], [1, 1, 2])
    choices.tell(ranking)
    ranking.tick(2)
    assert ranking.chosen.tolist() == [4, 5, 7]
    choices.add(2, torch.tensor([[0, 1]]))
    choices.tell(None)
    ranking.tick()
    assert ranking.chosen.tolist() == [], "what lies in memory whole is not ranked"
    assert counts.tolist() == [[1, 0, 1, 0], [1, 2, 0, 3], [1, 2, 0, 1]]


def test_without_a_popularity_the_first_pass_is_it() -> None:
    ranking = StaticPopularity(1, 3)
    assert ranking.scores.tolist() == [[0.0, 0.0, 0.0]]
    ranking.observe(0, np.array([2, 0]), np.array([5.0, 1.0]))
    ranking.tick(6)
    ranking.observe(0, np.array([1]))
    ranking.tick()
    assert ranking.scores.tolist() == [[1.0, 0.0, 5.0]]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of static, lru, lfu, adaptive, found 'mru'"):
        make_ranking("mru", 1, 1)
