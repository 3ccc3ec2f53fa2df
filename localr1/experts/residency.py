"""Which experts the slots of one tier hold, and which of them make room. Pure numpy, no torch: what
is copied where is the caller's work."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localr1.errors import MemoryLimitError
from localr1.experts.batched import Keys
from localr1.experts.policy import WORTHLESS, Ranking
from localr1.experts.victims import Victims

ABSENT: Final = -1
FREE: Final = -1
LONGEST_STAY: Final = 512.0
"""Passes beyond which no score foretells uses."""
BEGUN_LEARNING: Final = 0.05
"""Share of the last pass in what is believed of promotions a pass."""
FLOOR_ON_DEMAND: Final = 1.0
FLOOR_WITH_PROMOTIONS: Final = 0.5
"""The layer_floor where none is given, as was best on all traces of benchmarks/policy.py. What
comes in on demand comes layer by layer, and would else push out what the next layers just had."""


class Promotion(NamedTuple):
    """A copy to make: the expert of a layer into a slot, which holds it once the Residency was told
    `complete`. evicted_key: who had the slot, and lost it when this was decided, for it is written
    over; None where it was free. (A named tuple because a token makes many.)"""

    layer: int
    expert: int
    slot: int
    evicted_key: int | None


class Residency:
    """The slots of one tier, open to the experts of all layers or of some.

    ranking: what the experts are worth. The caller tells it what each pass chose; it may serve
    several tiers. insert_cap: how many promotions may be in flight at once, and so how many a pass
    can begin. break_even: the expected hits that a promotion must gain, in a ranking that estimates
    them. layer_floor: of an even share of the slots, what each layer keeps against the others;
    None: as FLOOR_ON_DEMAND says.
    exact: look at every expert held for the one to go, not at a list that is made now and then; an
    oracle needs it. layers: whose experts may come in unasked, None for all.

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
        layer_floor: float | None = None,
        exact: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        assert num_slots >= 0
        assert insert_cap >= 0
        if layer_floor is None:
            layer_floor = FLOOR_WITH_PROMOTIONS if insert_cap else FLOOR_ON_DEMAND
        assert 0.0 <= layer_floor <= 1.0
        self.num_layers, self.num_experts = num_layers, num_experts
        self.ranking = ranking
        self.insert_cap, self.break_even = insert_cap, break_even
        self.slot_of: NDArray[np.int32] = np.full((num_layers, num_experts), ABSENT, np.int32)
        self._slot_of = self.slot_of.reshape(-1)
        is_open = np.full((num_layers, num_experts), layers is None)
        is_open[list(layers or ())] = True
        self._is_open = is_open.reshape(-1)
        self._num_open_layers = num_layers if layers is None else len(layers)
        self._holders: Keys = np.full(num_slots, FREE, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins: dict[int, int] = {}
        self._in_flight: dict[int, Promotion] = {}
        # Slots taken by each layer, those in flight included.
        self._held = [0] * num_layers
        self._layer_floor = layer_floor
        self._floor = self._floor_of(num_slots)
        # Promotions a pass, lately.
        self._begun_a_pass = float(insert_cap)
        self._victims = Victims(ranking, exact)
        # (key, score) of those that `demand` evicts next, and what the ranking had seen by then.
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
        if not self._free and not self._in_flight:
            return self._holders.copy()
        keys = self._holders[self._holders != FREE]
        resident: Keys = keys[self._slot_of[keys] != ABSENT]
        return resident

    def key(self, layer: int, expert: int) -> int:
        return layer * self.num_experts + expert

    def is_resident(self, layer: int, expert: int) -> bool:
        return bool(self._slot_of[self.key(layer, expert)] != ABSENT)

    def pin(self, layer: int, expert: int) -> None:
        """It keeps its slot until it was unpinned as often as it was pinned."""
        key = self.key(layer, expert)
        assert self._slot_of[key] != ABSENT, "only what is held can be pinned"
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, layer: int, expert: int) -> None:
        key = self.key(layer, expert)
        count = self._pins.pop(key)
        if count > 1:
            self._pins[key] = count - 1

    def demand(self, layer: int, expert: int) -> tuple[int, int | None]:
        """(slot, who lost it): an absent expert comes in now. The ranking should know what the
        running pass chose of this layer. Raises MemoryLimitError where every slot is pinned or in
        flight."""
        key = self.key(layer, expert)
        assert self._slot_of[key] == ABSENT, "it is there"
        assert key not in self._in_flight, "it is on its way"
        evicted = None
        if not self._free:
            victim = self._lowest(layer) or self._any_victim(layer)
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

    def promotions(self) -> list[Promotion]:
        """After a pass: what is worth copying into this tier of what the pass chose, the best
        first. Each has its slot reserved until `complete` or `cancel`."""
        room = min(self.insert_cap - len(self._in_flight), self.num_slots)
        if room <= 0:
            return []
        chosen = self.ranking.chosen
        may_come = (self._slot_of.take(chosen) == ABSENT) & self._is_open.take(chosen)
        absent = may_come.nonzero()[0]
        scores = self.ranking.chosen_scores.take(absent)
        # Some may be on their way, so that many more are looked at. (There are hundreds: to part
        # the highest from the others would take longer than to sort all.)
        best = scores.argsort()[::-1][: room + len(self._in_flight)]
        keys = chosen.take(absent.take(best)).tolist()
        needed = self._needed()
        # Scores that are no estimate of uses may be negative.
        nothing = 0.0 if needed else -np.inf
        found: list[Promotion] = []
        for key, score in zip(keys, scores.take(best).tolist(), strict=True):
            if key in self._in_flight:
                continue
            if self._free:
                if score - nothing <= needed:
                    break
                found.append(self._reserve(key))
            else:
                lowest = self._unused(key // self.num_experts)
                if lowest is None or score - lowest[1] <= needed:
                    break
                found.append(self._take_over(lowest[0], key))
            if len(found) == room:
                break
        self._begun_a_pass += BEGUN_LEARNING * (len(found) - self._begun_a_pass)
        return found

    def _needed(self) -> float:
        """What a promotion's score must be above its victim's. An expert stays for as many passes
        as there are slots to each promotion, so that where little moves, little gain will do."""
        if not self.break_even:
            return 0.0
        stay = min(self.num_slots / max(self._begun_a_pass, 1e-9), LONGEST_STAY)
        return self.break_even / max(self.ranking.horizon, stay)

    def complete(self, promotion: Promotion) -> None:
        """Its copy is done. Between passes."""
        key = self.key(promotion.layer, promotion.expert)
        begun = self._in_flight.pop(key)
        assert begun is promotion
        self._hold(key, promotion.slot)

    def cancel(self, promotion: Promotion) -> None:
        """Its copy will not be made: the slot is free."""
        key = self.key(promotion.layer, promotion.expert)
        begun = self._in_flight.pop(key)
        assert begun is promotion
        self._release(key, promotion.slot)

    def remove(self, layer: int, expert: int) -> None:
        """An expert that is held, and not pinned, loses its slot."""
        key = self.key(layer, expert)
        assert self._slot_of[key] != ABSENT
        assert key not in self._pins
        self._evict(key)

    def shrink(self, num_slots: int) -> list[int]:
        """Give up the slots from number `num_slots` on; returns the keys that lost theirs. Nothing
        pinned or in flight may be in them."""
        assert 0 <= num_slots <= self.num_slots
        lost = [key for key in self._holders[num_slots:].tolist() if key != FREE]
        for key in lost:
            assert key not in self._pins
            assert key not in self._in_flight
            self._evict(key)
        self._holders = self._holders[:num_slots].copy()
        self._free = [slot for slot in self._free if slot < num_slots]
        self._floor = self._floor_of(num_slots)
        return lost

    def grow(self, num_slots: int) -> None:
        """There are more slots, numbered on."""
        more = range(self.num_slots, num_slots)
        assert self.num_slots <= num_slots
        self._free = [*reversed(more), *self._free]
        self._holders = np.concatenate([self._holders, np.full(len(more), FREE, np.int64)])
        self._floor = self._floor_of(num_slots)

    def warm_start(self, limit: int | None = None) -> list[Promotion]:
        """Fill free slots, at most `limit`, with the absent experts of the highest scores, such as
        a prefill gave them, each layer up to its floor first. Among equals the layers take turns.
        The insert cap does not hold, as nothing else runs. Each is to be told `complete` or
        `cancel`."""
        room = len(self._free) if limit is None else min(limit, len(self._free))
        keys = np.arange(self.num_layers * self.num_experts)
        in_turn = keys.reshape(self.num_layers, self.num_experts).T.reshape(-1)
        absent = in_turn[(self._slot_of[in_turn] == ABSENT) & self._is_open[in_turn]]
        absent = np.setdiff1d(absent, list(self._in_flight), assume_unique=True)
        order = np.argsort(-self.ranking.score(absent), kind="stable")
        first: list[int] = []
        rest: list[int] = []
        held = self._held.copy()
        for key in absent[order].tolist():
            layer = key // self.num_experts
            held[layer] += 1
            (first if held[layer] <= self._floor else rest).append(key)
        return [self._reserve(key) for key in [*first, *rest][:room]]

    def reserve(self, keys: Sequence[int]) -> list[Promotion]:
        """Free slots for those of `keys` that are absent and may come in, as far as the slots go.
        Each is to be told `complete` or `cancel`."""
        absent = [key for key in self._may_hold(keys) if key not in self._in_flight]
        return [self._reserve(key) for key in absent[: len(self._free)]]

    def make_room_for(self, keys: Sequence[int]) -> list[int]:
        """Evict experts that are not among `keys`, those of the lowest scores, until there is a
        free slot for each of `keys` that is absent and may come in; returns who lost theirs.
        Nothing may be pinned or in flight."""
        assert not self._pins
        assert not self._in_flight
        wanted = np.unique(np.array(keys, np.int64))
        num_absent = len(self._may_hold(wanted.tolist()))
        others = np.setdiff1d(self.resident_keys, wanted, assume_unique=True)
        order = np.argsort(self.ranking.score(others), kind="stable")
        lost: list[int] = others[order][: max(num_absent - len(self._free), 0)].tolist()
        for key in lost:
            self._evict(key)
        return lost

    def _may_hold(self, keys: Sequence[int]) -> list[int]:
        """Those that are absent, of layers that this is open to."""
        return [key for key in keys if self._slot_of[key] == ABSENT and self._is_open[key]]

    def _floor_of(self, num_slots: int) -> int:
        """Slots that a layer keeps against the others."""
        return int(self._layer_floor * num_slots / max(self._num_open_layers, 1))

    def _reserve(self, key: int) -> Promotion:
        """For a free slot."""
        layer, expert = divmod(key, self.num_experts)
        promotion = Promotion(layer, expert, self._free.pop(), None)
        self._take(key, promotion.slot)
        self._in_flight[key] = promotion
        return promotion

    def _take_over(self, victim: int, key: int) -> Promotion:
        """`_evict` and `_reserve` in one: most promotions of a long run."""
        layer, expert = divmod(key, self.num_experts)
        slot = self._slot_of.item(victim)
        self._slot_of[victim] = ABSENT
        self._holders[slot] = key
        self._held[victim // self.num_experts] -= 1
        self._held[layer] += 1
        promotion = self._in_flight[key] = Promotion(layer, expert, slot, victim)
        return promotion

    def _unused(self, layer: int) -> tuple[int, float] | None:
        """Who makes room for a promotion of `layer`, and its score or a little more: the lowest
        that no pass chose since the list was made."""
        victims = self._victims
        # numpy's quickest way to one number.
        slot_of, last_pass = self._slot_of.item, self.ranking.last_pass.item
        for anew in (True,) if victims.is_old else (False, True):
            if anew:
                victims.list_anew(self.resident_keys)
            order, listed_in, place = victims.order, victims.listed_in, 0
            while place < len(order):
                key, score = order[place]
                if slot_of(key) == ABSENT or last_pass(key) >= listed_in:
                    del order[place]
                elif self._may_go(key, score, layer):
                    return order[place]
                else:
                    place += 1
        return None

    def has_room_for(self, layer: int, score: float) -> bool:
        """Whether `demand` of an absent expert with this score would take a free slot, or one of
        less worth."""
        if self._free:
            return True
        place = self._place_of_lowest(layer)
        return place is not None and score > self._ranked[place][1]

    def _lowest(self, layer: int) -> tuple[int, float] | None:
        """Who makes room for an expert of `layer` at once."""
        place = self._place_of_lowest(layer)
        return None if place is None else self._ranked.pop(place)

    def _place_of_lowest(self, layer: int) -> int | None:
        """In the list of who is evicted next."""
        for anew in (False, True):
            if anew or self._ranked_as_of != self.ranking.version:
                if anew or self._victims.is_old:
                    self._victims.list_anew(self.resident_keys)
                listed = self._victims.listed()
                self._ranked = self._victims.ranked(listed[self._slot_of.take(listed) != ABSENT])
                self._ranked_as_of = self.ranking.version
            for place, (key, score) in enumerate(self._ranked):
                if self._slot_of[key] != ABSENT and self._may_go(key, score, layer):
                    return place
        return None

    def _may_go(self, key: int, score: float, layer: int) -> bool:
        """Whether it is not pinned, and its layer can spare it for `layer`."""
        of = key // self.num_experts
        can_spare = of == layer or self._held[of] > self._floor or score <= WORTHLESS
        return can_spare and key not in self._pins

    def _any_victim(self, layer: int) -> tuple[int, float] | None:
        """As `_lowest`, among all that are held; another layer goes below its floor where
        nothing else is left."""
        keys = self.resident_keys
        keys = np.array([key for key in keys.tolist() if key not in self._pins], np.int64)
        if not len(keys):
            return None
        scores = self.ranking.score(keys)
        layers = keys // self.num_experts
        fair = (layers == layer) | (np.array(self._held)[layers] > self._floor)
        fair |= scores <= WORTHLESS
        order = np.lexsort((scores, ~fair))
        return int(keys[order[0]]), float(scores[order[0]])

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
