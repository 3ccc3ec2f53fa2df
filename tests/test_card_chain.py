"""Layers on several cards, one behind another: what they say is what one card says, to the bit;
none reaches another's memory; the host waits when all have their work. On the model of cards."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from card_models import CAPACITY, CASES, Placed, on_host, placed_on, some_cards, source
from driver_model import LARGE, ModelDriver
from kernel_cases import assert_same_bits
from test_card_decoder import DRIVERS, ILLEGAL, decoded_calls, run_on
from test_models_quantized import SAME_BLOCKS, relative
from tiny_models import prompt, run_in_chunks

from localr1.card.layers import CardLayers
from localr1.errors import DeviceError, MemoryLimitError, UsageError
from localr1.models.step import Step

LAYERS = 5
IDS = prompt(0, 90)


@contextmanager
def chained(
    *memory: int, case: str = "qwen3", asked: int | None = None, kind: str = "late"
) -> Iterator[Placed]:
    """Five layers on as many cards as there are sizes of memory."""
    drivers = some_cards(*[DRIVERS[kind]] * len(memory))
    with placed_on(drivers, list(memory), case, layers=LAYERS, asked=asked) as setup:
        yield setup


def shares(setup: Placed) -> list[int]:
    return [card.num_layers for card in setup.model.layers.cards]


# Every model, and every order of work: all of both would take minutes.
@pytest.mark.parametrize(("case", "kind"), list(zip(CASES, DRIVERS, strict=True)))
def test_the_bits_are_those_of_one_card(case: str, kind: str) -> None:
    """Of two and of three, in chunks beside and across what a run takes, then one by one."""
    with chained(LARGE, case=case, kind=kind) as setup:
        wanted = run_in_chunks(setup.model, IDS, [67, 1, 9])
    for memory, expected in (((LARGE, LARGE), [3, 2]), ((LARGE, LARGE // 2, LARGE), [2, 1, 2])):
        with chained(*memory, case=case, kind=kind) as setup:
            assert shares(setup) == expected
            assert setup.model.layers.has_head
            assert_same_bits(run_in_chunks(setup.model, IDS, [67, 1, 9]), wanted, memory)


def test_cards_of_different_orders_of_work() -> None:
    """One that does all at once before one that does it late, and the other way round."""
    with chained(LARGE) as setup:
        wanted = run_in_chunks(setup.model, IDS, [20])
    for first, second in (("at once", "late"), ("late", "at once"), ("pageable", "late")):
        drivers = some_cards(DRIVERS[first], DRIVERS[second])
        with placed_on(drivers, [LARGE] * 2, layers=LAYERS) as setup:
            assert_same_bits(run_in_chunks(setup.model, IDS, [20]), wanted, (first, second))


def test_a_token_is_one_graph_a_card_which_are_all_given_before_the_host_waits() -> None:
    with chained(LARGE, LARGE, LARGE) as setup:
        order: list[str] = []

        def note(name: str, kind: str) -> None:
            order.append(f"{kind} {name}")

        for driver in setup.drivers:
            driver.on_call = partial(note, driver.name)
        decoded_calls(setup, 1)
        order = [each for each in order if not each.startswith("enter")][-11:]
        waits = [f"synchronize model {number}" for number in range(3)]
        given = ["launch_graph model 0", "record model 0", "wait_for model 1"]
        given += ["launch_graph model 1", "record model 1", "wait_for model 2"]
        assert order == [waits[-1], *given, "launch_graph model 2", *waits]


@pytest.mark.parametrize("asked", [2, 4])
def test_the_cpu_computes_the_rest(asked: int) -> None:
    with chained(LARGE, LARGE, asked=asked) as setup:
        half = asked // 2
        assert (
            f"model 0 computes {half} and model 1 {half} of 5 layers, the CPU" in setup.model.where
        )
        found = run_in_chunks(setup.model, IDS, [17, 11])
        assert relative(found, run_in_chunks(setup.host, IDS, [17, 11])) < SAME_BLOCKS
        cache = setup.model.new_cache(8)
        setup.model.forward(Step(IDS[:8], 0), cache)
        whole = setup.host.new_cache(8)
        assert cache.position_bytes == whole.position_bytes * (LAYERS - asked) // LAYERS


def test_memory_decides_who_computes_what() -> None:
    """Each card takes no more than it may, and all that there is together holds all layers."""
    with chained(LARGE) as setup:
        whole = setup.driver.taken
    with chained(LARGE, asked=1) as setup:
        one = setup.driver.taken
    for memory, least in (
        ((one, whole), [1, 4]),
        ((whole, one), [4, 1]),
        ((whole, whole), [3, 2]),
        ((one, one), [1, 1]),
        ((whole, (one + whole) // 2, one), [3, 1, 1]),
    ):
        with chained(*memory) as setup:
            assert shares(setup) == least, memory
            for driver, most in zip(setup.drivers, memory, strict=True):
                assert 0 < driver.taken <= most
            found = run_in_chunks(setup.model, IDS[:20], [12])
            assert relative(found, run_in_chunks(setup.host, IDS[:20], [12])) < SAME_BLOCKS
    with (
        pytest.raises(MemoryLimitError, match="model 1: memory for 1 layer"),
        chained(one, one // 2),
    ):
        pass
    with pytest.raises(UsageError, match="5 layers for 6 cards"), chained(*[LARGE] * 6):
        pass


def test_memory_ends_at_every_allocation_of_either_card() -> None:
    """With what was there before: fewer layers, of which the next card takes over what it has room
    for; or one error, and nothing left behind on any."""
    outcomes = []
    for number in range(2):
        reached, at = False, 0
        while not reached:
            at += 1
            drivers = some_cards({}, {})
            error = MemoryLimitError("model: allocate", found="no memory")
            drivers[number].arm("allocate", at, error)
            try:
                with placed_on(drivers, [LARGE] * 2, layers=LAYERS) as setup:
                    reached = drivers[number].calls["allocate"] < at
                    found = run_in_chunks(setup.model, IDS[:20], [12])
                    assert relative(found, run_in_chunks(setup.host, IDS[:20], [12])) < SAME_BLOCKS
                    outcomes.append((*shares(setup), setup.model.layers.has_head))
            except MemoryLimitError:
                outcomes.append((0, 0, False))
                assert all(driver.taken == driver.num_pinned == 0 for driver in drivers)
    none = [(0, 0, False)] * 4
    first = [*none, *[(1, 4, True)] * 2, *[(2, 3, True)] * 2, (3, 2, True)]
    second = [*none, *[(3, 1, False)] * 2, (3, 2, False), (3, 2, True)]
    assert outcomes == [*first, *second]


def test_a_cache_that_is_gone_leaves_its_memory_to_the_next() -> None:
    with chained(LARGE, LARGE) as setup:
        first, taken = setup.model.new_cache(CAPACITY), [d.taken for d in setup.drivers]
        second = setup.model.new_cache(40)
        assert all(d.taken > before for d, before in zip(setup.drivers, taken, strict=True))
        both = [d.taken for d in setup.drivers]
        del first, second
        gc.collect()
        third = setup.model.new_cache(40)
        assert [d.taken for d in setup.drivers] == both
        fourth = setup.model.new_cache(40)
        setup.drivers[1].arm("allocate", 1, MemoryLimitError("model: allocate"))
        with pytest.raises(MemoryLimitError):
            setup.model.new_cache(40)
        del third, fourth
        gc.collect()
        for _ in range(2):
            found = run_in_chunks(setup.model, IDS[:9], [4])
            assert relative(found, run_in_chunks(setup.host, IDS[:9], [4])) < SAME_BLOCKS


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize(
    ("kind", "at"),
    [("copy_in", 1), ("launch", 7), ("synchronize", 3), ("launch_graph", 2), ("wait_for", 2)],
)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_card_that_fails_costs_one_error(number: int, kind: str, at: int, lost: bool) -> None:
    """Afterwards the CPU computes everything, to the bit."""
    if kind == "wait_for" and number == 0:
        kind = "record"
    ids = prompt(0, 12)
    with chained(LARGE, LARGE, LARGE) as setup:
        model = setup.model
        cache, other = model.new_cache(40), model.new_cache(40)
        model.forward(Step(ids[:3], 0), other)
        setup.drivers[number].arm(kind, at, ILLEGAL, lost=lost)
        told = "model 0 and model 1 and model 2: .* tokens? through 5 layers.*ILLEGAL_ADDRESS"
        with pytest.raises(DeviceError, match=told):
            run_on(model, cache)
        assert model.is_lost
        expected = run_in_chunks(setup.host, ids, [4])
        assert_same_bits(run_in_chunks(model, ids, [4]), expected, "a new cache")
        logits = model.forward(Step(ids, 0, all_logits=True), cache)
        assert_same_bits(logits[:4], expected[:4], "the cache that was in use")
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            model.forward(Step(ids[3:4], 3), other)


@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupt_leaves_the_cards_in_use(number: int) -> None:
    """While the host waits for either: what was given is waited for before the next."""
    ids = prompt(0, 12)
    with chained(LARGE, LARGE) as setup:
        cache = setup.model.new_cache(40)
        setup.model.forward(Step(ids[:6], 0), cache)
        setup.drivers[number].arm("synchronize", 1, KeyboardInterrupt())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            setup.model.forward(Step(ids[6:10], 6), cache)
        assert cache.length == 6
        found = setup.model.forward(Step(ids[6:], 6, all_logits=True), cache)
        expected = run_in_chunks(setup.host, ids, [12])[6:]
        assert relative(found, expected) < SAME_BLOCKS


def leave_out_the_event(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelDriver, "wait_for", lambda *_: None)


def stay_in_the_first_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelDriver, "enter", lambda self: None)


def hand_on_too_few(patch: pytest.MonkeyPatch) -> None:
    original = CardLayers.give

    def give(self: CardLayers, tokens: int, *rest: Any, **options: Any) -> None:
        original(self, max(1, tokens - 1), *rest, **options)

    patch.setattr(CardLayers, "give", give)


def use_the_first_cards_memory(patch: pytest.MonkeyPatch) -> None:
    """What a process can do on the CPU, and on a machine whose cards reach each other; not here."""
    original = CardLayers.add
    added: list[CardLayers] = []

    def add(self: CardLayers, layer: object) -> None:
        original(self, layer)  # type: ignore[arg-type]
        added.append(self)
        self._layers[-1] = added[0]._layers[0]

    patch.setattr(CardLayers, "add", add)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a card does not wait for the one before": leave_out_the_event,
    "a card is not entered": stay_in_the_first_card,
    "a token too few": hand_on_too_few,
    "weights of another card's": use_the_first_cards_memory,
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_seen(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_in_chunks(on_host(source("qwen3", 4, LAYERS)), IDS[:20], [12])
    PLANTED[error](monkeypatch)
    drivers = some_cards(*[{"others_first": True}] * 2)
    seen = False
    try:
        with placed_on(drivers, [LARGE] * 2, layers=LAYERS) as setup:
            found = run_in_chunks(setup.model, IDS[:20], [12])
            seen = not relative(found, expected) < 3 * SAME_BLOCKS
    except (AssertionError, DeviceError):
        seen = True
    assert seen
