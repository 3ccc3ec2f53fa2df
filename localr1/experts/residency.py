"""Which experts the slots of one tier hold, and which of them make room. Pure numpy, no torch: what
is copied where is the caller's work."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from localr1.errors import MemoryLimitError
from localr1.experts.batched import Keys
from localr1.experts.policy import Ranking
from localr1.experts.victims import Victims

ABSENT: Final = -1
FREE: Final = -1


@dataclass(frozen=True)
class Promotion:
    """A copy to make: the expert of a layer into a slot, which holds it once the Residency was told
    `complete`. evicted_key: who had the slot, and lost it when this was decided, for it is written
    over; None where it was free."""

    layer: int
    expert: int
    slot: int
    evicted_key: int | None


class Residency:
    """The slots of one tier, open to the experts of all layers.

    ranking: what the experts are worth. The caller tells it what each pass chose; it may serve
    several tiers. insert_cap: how many promotions may be in flight at once, and so how many a pass
    can begin. break_even: the expected hits that a promotion must gain, in a ranking that estimates
    them. layer_floor: of an even share of the slots, what each layer keeps against the others.
    exact: look at every expert held for the one to go, not at a list that is made now and then; an
    oracle needs it.

    slot_of: int32 [num_layers, num_experts], ABSENT for what this tier does not hold. Always the
    same array; `demand`, `promotions`, `complete`, `remove` and `shrink` change it.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        ranking: Ranking,
        *,
        insert_cap: int,
        break_even: float = 1.0,
        layer_floor: float = 0.5,
        exact: bool = False,
    ) -> None:
        assert num_slots >= 0
        assert insert_cap >= 0
        assert 0.0 <= layer_floor <= 1.0
        self.num_layers, self.num_experts = num_layers, num_experts
        self.ranking = ranking
        self.insert_cap, self.break_even = insert_cap, break_even
        self.slot_of: NDArray[np.int32] = np.full((num_layers, num_experts), ABSENT, np.int32)
        self._slot_of = self.slot_of.reshape(-1)
        self._holders: Keys = np.full(num_slots, FREE, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins: NDArray[np.int32] = np.zeros(num_layers * num_experts, np.int32)
        self._in_flight: dict[int, Promotion] = {}
        # Slots taken by each layer, those in flight included.
        self._held: Keys = np.zeros(num_layers, np.int64)
        self._layer_floor = layer_floor
        self._victims = Victims(ranking, exact)
        # (key, score) of those that go next, and the ranking's version that said so.
        self._ranked: list[tuple[int, float]] = []
        self._ranked_as_of = -1

    @property
    def num_slots(self) -> int:
        return len(self._holders)

    @property
    def num_resident(self) -> int:
        return self.num_slots - len(self._free) - len(self._in_flight)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def resident_keys(self) -> Keys:
        """By slot, ascending."""
        keys = self._holders[self._holders != FREE]
        resident: Keys = keys[self._slot_of[keys] != ABSENT]
        return resident

    @property
    def floor(self) -> int:
        """Slots that a layer keeps against the others."""
        return int(self._layer_floor * self.num_slots / self.num_layers)

    def key(self, layer: int, expert: int) -> int:
        return layer * self.num_experts + expert

    def is_resident(self, layer: int, expert: int) -> bool:
        return bool(self._slot_of[self.key(layer, expert)] != ABSENT)

    def pin(self, layer: int, expert: int) -> None:
        """It keeps its slot until it was unpinned as often as it was pinned."""
        key = self.key(layer, expert)
        assert self._slot_of[key] != ABSENT, "only what is held can be pinned"
        self._pins[key] += 1

    def unpin(self, layer: int, expert: int) -> None:
        key = self.key(layer, expert)
        assert self._pins[key] > 0
        self._pins[key] -= 1

    def demand(self, layer: int, expert: int) -> tuple[int, int | None]:
        """(slot, who lost it): an absent expert comes in now. The ranking should know what the
        running pass chose of this layer. Raises MemoryLimitError where every slot is pinned or in
        flight."""
        key = self.key(layer, expert)
        assert self._slot_of[key] == ABSENT, "it is there"
        assert key not in self._in_flight, "it is on its way"
        evicted = None
        if not self._free:
            victim = self._next_victim(layer) or self._any_victim(layer)
            if victim is None:
                raise MemoryLimitError(
                    "experts in use at once",
                    expected=f"at most {self.num_slots}, the slots of their tier",
                    found="one more",
                    fix="Give it more memory.",
                )
            evicted = victim[0]
            self._evict(evicted)
        slot = self._free.pop()
        self._take(key, slot)
        self._hold(key, slot)
        return slot, evicted

    def end_pass(self) -> None:
        """A pass is over: scores have fallen. `promotions` says so too."""
        self._victims.end_pass()

    def promotions(self) -> list[Promotion]:
        """After a pass: what is worth copying into this tier of what the pass chose, the best
        first. Each has its slot reserved until `complete` or `cancel`."""
        self._victims.end_pass()
        room = min(self.insert_cap - len(self._in_flight), self.num_slots)
        chosen = self.ranking.chosen
        if room <= 0 or not len(chosen):
            return []
        candidates = chosen[self._slot_of[chosen] == ABSENT]
        if not len(candidates):
            return []
        scores = self.ranking.score(candidates)
        found: list[Promotion] = []
        # Some may be on their way, so that many more are looked at.
        for place in _highest(scores, room + len(self._in_flight)).tolist():
            key = int(candidates[place])
            if key in self._in_flight:
                continue
            promotion = self._promote(key, float(scores[place]))
            if promotion is None:
                break
            found.append(promotion)
            if len(found) == room:
                break
        return found

    def complete(self, promotion: Promotion) -> None:
        """Its copy is done. Between passes."""
        key = self.key(promotion.layer, promotion.expert)
        assert self._in_flight.pop(key) is promotion
        self._hold(key, promotion.slot)

    def cancel(self, promotion: Promotion) -> None:
        """Its copy will not be made: the slot is free."""
        key = self.key(promotion.layer, promotion.expert)
        assert self._in_flight.pop(key) is promotion
        self._release(key, promotion.slot)

    def remove(self, layer: int, expert: int) -> None:
        """An expert that is held, and not pinned, loses its slot."""
        key = self.key(layer, expert)
        assert self._slot_of[key] != ABSENT
        assert not self._pins[key]
        self._evict(key)

    def shrink(self, num_slots: int) -> list[int]:
        """Give up the slots from number `num_slots` on; returns the keys that lost theirs. Nothing
        pinned or in flight may be in them."""
        assert 0 <= num_slots <= self.num_slots
        lost = [key for key in self._holders[num_slots:].tolist() if key != FREE]
        for key in lost:
            assert not self._pins[key]
            assert key not in self._in_flight
            self._evict(key)
        self._holders = self._holders[:num_slots].copy()
        self._free = [slot for slot in self._free if slot < num_slots]
        return lost

    def grow(self, num_slots: int) -> None:
        """There are more slots, numbered on."""
        more = range(self.num_slots, num_slots)
        assert self.num_slots <= num_slots
        self._free = [*reversed(more), *self._free]
        self._holders = np.concatenate([self._holders, np.full(len(more), FREE, np.int64)])

    def warm_start(self, limit: int | None = None) -> list[Promotion]:
        """Fill free slots, at most `limit`, with the absent experts of the highest scores, such as
        a prefill gave them, each layer up to its floor first. Among equals the layers take turns.
        The insert cap does not hold, as nothing else runs. Each is to be told `complete` or
        `cancel`."""
        room = len(self._free) if limit is None else min(limit, len(self._free))
        keys = np.arange(self.num_layers * self.num_experts)
        in_turn = keys.reshape(self.num_layers, self.num_experts).T.reshape(-1)
        absent = in_turn[self._slot_of[in_turn] == ABSENT]
        absent = np.setdiff1d(absent, list(self._in_flight), assume_unique=True)
        order = np.argsort(-self.ranking.score(absent), kind="stable")
        first: list[int] = []
        rest: list[int] = []
        held = self._held.copy()
        for key in absent[order].tolist():
            layer = key // self.num_experts
            held[layer] += 1
            (first if held[layer] <= self.floor else rest).append(key)
        return [self._reserve(key, None) for key in [*first, *rest][:room]]

    def _promote(self, key: int, score: float) -> Promotion | None:
        """None where it does not pay, or nothing can make room."""
        horizon = self.ranking.horizon
        if self._free:
            return self._reserve(key, None) if score * horizon > self.break_even else None
        victim = self._next_victim(key // self.num_experts)
        if victim is None or not (score - victim[1]) * horizon > self.break_even:
            return None
        self._evict(victim[0])
        return self._reserve(key, victim[0])

    def _reserve(self, key: int, evicted_key: int | None) -> Promotion:
        layer, expert = divmod(key, self.num_experts)
        promotion = Promotion(layer, expert, self._free.pop(), evicted_key)
        self._take(key, promotion.slot)
        self._in_flight[key] = promotion
        return promotion

    def _rank(self, anew: bool = False) -> None:
        """`_ranked`, as of now."""
        if self._ranked_as_of == self.ranking.version and not anew:
            return
        if self._victims.is_old or anew:
            self._victims.list_anew(self.resident_keys)
        listed = self._victims.listed()
        self._ranked = self._victims.ranked(listed[self._slot_of[listed] != ABSENT])
        self._ranked_as_of = self.ranking.version

    def _next_victim(self, layer: int) -> tuple[int, float] | None:
        """Makes room for an expert of `layer`: the lowest score of those that may go."""
        for anew in (False, True):
            self._rank(anew)
            for place, (key, _) in enumerate(self._ranked):
                if self._may_go(key, layer):
                    return self._ranked.pop(place)
        return None

    def _any_victim(self, layer: int) -> tuple[int, float] | None:
        """As `_next_victim`, among all that are held; another layer goes below its floor where
        nothing else is left."""
        keys = self.resident_keys
        keys = keys[self._pins[keys] == 0]
        if not len(keys):
            return None
        scores = self.ranking.score(keys)
        layers = keys // self.num_experts
        fair = (layers == layer) | (self._held[layers] > self.floor)
        order = np.lexsort((scores, ~fair))
        return int(keys[order[0]]), float(scores[order[0]])

    def _may_go(self, key: int, layer: int) -> bool:
        """Whether it is held, not pinned, and its layer can spare it for `layer`."""
        if self._slot_of[key] == ABSENT or self._pins[key]:
            return False
        of = key // self.num_experts
        return of == layer or bool(self._held[of] > self.floor)

    def _take(self, key: int, slot: int) -> None:
        self._holders[slot] = key
        self._held[key // self.num_experts] += 1

    def _hold(self, key: int, slot: int) -> None:
        self._slot_of[key] = slot
        self._victims.came(key)

    def _evict(self, key: int) -> None:
        slot = int(self._slot_of[key])
        self._slot_of[key] = ABSENT
        self._release(key, slot)

    def _release(self, key: int, slot: int) -> None:
        self._holders[slot] = FREE
        self._held[key // self.num_experts] -= 1
        self._free.append(slot)


def _highest(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Places of the `count` highest, descending."""
    if count < len(scores):
        best = np.argpartition(-scores, count - 1)[:count]
        return best[np.argsort(-scores[best], kind="stable")]
    return np.argsort(-scores, kind="stable")
