"""The store of experts with a card: the answer is the CPU's, to the bit; a card that fails, or has
no room, costs one error at most. On the model of a card, and on one where there is one."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import pytest
from driver_model import LARGE, ModelDriver
from gpu_model import skip_where_there_is_no_model
from kernel_cases import assert_same_bits
from stored_models import expected, stored, tokens

from localr1.errors import CheckpointError, DeviceError, KernelError, MemoryLimitError
from localr1.experts import cuda
from localr1.experts.schedule import POINTS, Curve, Rates
from localr1.experts.store_options import StoreOptions
from localr1.kernels.gpu_driver import MODEL_PROGRAMS, Driver, open_card
from localr1.kernels.gpu_program import kept_programs
from localr1.settings import Settings

LENGTH, PREFILL = 14, 6
PASSES = LENGTH - PREFILL + 1
MODELS = ("qwen3_moe", "deepseek_v3")
Drivers = Callable[[int], Driver]


def model_driver(rows: int) -> Driver:
    skip_where_there_is_no_model()
    return ModelDriver(rows, seed=2)


def eager_driver(rows: int) -> Driver:
    skip_where_there_is_no_model()
    return ModelDriver(rows, seed=1, eager=True)


def card_driver(rows: int) -> Driver:
    try:
        return open_card(kept_programs(Settings.from_environment()), rows, MODEL_PROGRAMS)
    except KernelError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["model", "eager model", pytest.param("card", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Drivers:
    made = {"model": model_driver, "eager model": eager_driver, "card": card_driver}
    return made[request.param]


@pytest.fixture(autouse=True)
def rates_that_prefer_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a card is so slow that nothing would be computed on it."""

    def fixed(*_: object) -> Rates:
        quick = Curve([1e-7] * len(POINTS))
        return Rates(Curve([1.0] * len(POINTS)), quick, quick, 1e-7)

    monkeypatch.setattr("localr1.experts.store.measure_rates", fixed)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("ram", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("device", [0.1, 0.5, 1.0])
def test_the_answer_does_not_depend_on_where_experts_lie(
    model_type: str, ram: float, device: float, driver: Drivers
) -> None:
    """Of budgets, policies, threads, and a cache cold or warm: equal bits."""
    wanted = expected(model_type, LENGTH, PREFILL)
    for options, threads in ((StoreOptions("adaptive"), 1), (StoreOptions("lru"), 2)):
        with stored(model_type, ram, device, options, threads=threads, driver=driver) as model:
            for state in ("cold", "warm"):
                found = model.logits(tokens(LENGTH), PREFILL)
                assert_same_bits(found, wanted, (options, state))
            assert model.store.usage.device_hits > 0
            if device < 1.0 and ram > 0.0:
                assert model.store.usage.streamed > 0


def test_what_the_card_drops_comes_back_to_ram(driver: Drivers) -> None:
    wanted = expected("deepseek_v3", 40, PREFILL)
    options = StoreOptions(read_ahead=False)
    with stored("deepseek_v3", 0.65, 0.25, options, driver=driver) as model:
        for _ in range(2):
            assert_same_bits(model.logits(tokens(40), PREFILL), wanted, "moved")
        assert model.store.usage.demotions > 0


def test_promotions_take_effect(driver: Drivers) -> None:
    """With everything in RAM, hot experts are copied to the card and computed there."""
    wanted = expected("deepseek_v3", 40, PREFILL)
    with stored("deepseek_v3", 1.0, 0.3, driver=driver) as model:
        assert_same_bits(model.logits(tokens(40), PREFILL), wanted, "while they move")
        assert model.store.usage.promotions > 0


def test_rates_are_measured_on_the_card(monkeypatch: pytest.MonkeyPatch, driver: Drivers) -> None:
    monkeypatch.undo()
    wanted = expected("qwen3_moe", LENGTH, PREFILL)
    with stored("qwen3_moe", 0.5, 0.3, driver=driver) as model:
        assert model.store.rates is not None
        assert model.store.rates.device(1) > 0.0
        assert model.store.rates.link > 0.0
        assert_same_bits(model.logits(tokens(LENGTH), PREFILL), wanted, "measured")


ILLEGAL = DeviceError("model: cuStreamSynchronize", found="ILLEGAL_ADDRESS")


class Kept:
    """Keeps the driver that `stored` asks for."""

    def __init__(self, total: int = LARGE) -> None:
        skip_where_there_is_no_model()
        self.total = total

    def __call__(self, rows: int) -> Driver:
        self.driver = ModelDriver(rows, total=self.total)
        return self.driver


@pytest.mark.parametrize("ram", [0.3, 1.0])
@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("launch", 1),
        ("launch", 2),
        ("launch", 20),
        ("synchronize", 1),
        ("synchronize", 9),
        ("copy_in", 1),
        ("copy_in", 30),
        ("copy_out", 3),
    ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_card_that_fails_costs_one_error(kind: str, at: int, ram: float, lost: bool) -> None:
    """Whatever it was doing. Afterwards the CPU computes alone, from RAM and files."""
    wanted = expected("deepseek_v3", LENGTH, PREFILL)
    kept = Kept()
    with stored("deepseek_v3", ram, 0.4, driver=kept) as model:
        model.logits(tokens(LENGTH), PREFILL)
        kept.driver.arm(kind, at, ILLEGAL, lost=lost)
        with pytest.raises(DeviceError, match=r"model: .*ILLEGAL_ADDRESS"):
            model.logits(tokens(LENGTH), PREFILL)
        hits = model.store.usage.device_hits
        for _ in range(2):
            found = model.logits(tokens(LENGTH), PREFILL)
            assert_same_bits(found, wanted, "after the error")
        assert model.store.usage.device_hits == hits
        assert model.store.num_on_device == model.store.num_device_slots == 0
        model.store.ram.drain()
        assert model.store.ram.room == model.store.ram.residency.num_slots
    assert kept.driver.closed == 1


def test_a_copy_that_fails_leaves_the_expert_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one copy, not of the card: that stays in use, without the expert."""
    wanted = expected("deepseek_v3", LENGTH, PREFILL)
    with stored("deepseek_v3", 1.0, 0.3, driver=Kept()) as model:
        failed: Future[float] = Future()
        failed.set_exception(MemoryLimitError("the link"))
        with monkeypatch.context() as patch:
            patch.setattr(model.store.devices[0], "upload", lambda *_: failed)
            with pytest.raises(MemoryLimitError, match="the link"):
                model.logits(tokens(LENGTH), PREFILL)
        slots = model.store.num_device_slots
        with suppress(MemoryLimitError):  # Of copies that were begun by then.
            model.logits(tokens(LENGTH), PREFILL)
        for _ in range(2):
            found = model.logits(tokens(LENGTH), PREFILL)
            assert_same_bits(found, wanted, "after the error")
        assert model.store.num_device_slots == slots > 0
        assert model.store.usage.promotions > 0


def test_a_copy_back_that_fails_costs_one_error_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, where a token waited for it; else the expert is read from its file."""
    wanted = expected("deepseek_v3", 40, PREFILL)
    options = StoreOptions(read_ahead=False)
    failed: Future[float] = Future()
    failed.set_exception(ILLEGAL)
    with stored("deepseek_v3", 0.65, 0.25, options, driver=Kept()) as model:
        asked = errors = 0

        def download(*_: object) -> "Future[float]":
            nonlocal asked
            asked += 1
            return failed

        monkeypatch.setattr(model.store.devices[0], "download", download)
        for _ in range(4):
            try:
                assert_same_bits(model.logits(tokens(40), PREFILL), wanted, "read instead")
            except DeviceError:
                errors += 1
        assert asked > 0
        assert errors <= 1
        assert errors == 0 or model.store.num_device_slots == 0


def test_an_error_of_a_file_leaves_the_card_in_use() -> None:
    wanted = expected("deepseek_v3", LENGTH, PREFILL)
    with stored("deepseek_v3", 0.2, 0.3, driver=Kept()) as model:
        model.checkpoint.arm(CheckpointError("bad sector"), 3)
        with pytest.raises(CheckpointError):
            model.logits(tokens(LENGTH), PREFILL)
        hits = model.store.usage.device_hits
        assert_same_bits(model.logits(tokens(LENGTH), PREFILL), wanted, "after the error")
        assert model.store.usage.device_hits > hits


def test_slots_give_way_where_others_take_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to none, bit by bit, and no run fails."""
    monkeypatch.setattr("localr1.experts.store.PASSES_BETWEEN_LOOKS", 2)
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(cuda, "LOW_MEMORY", 16 << 10)
    wanted = expected("deepseek_v3", LENGTH, PREFILL)
    kept = Kept(total=32 << 20)
    with stored("deepseek_v3", 1.0, 0.5, driver=kept) as model:
        slots, taken = model.store.num_device_slots, kept.driver.taken
        kept.driver.others = kept.driver.free_memory() - (10 << 10)
        assert_same_bits(model.logits(tokens(LENGTH), PREFILL), wanted, "a little")
        fewer = model.store.num_device_slots
        assert 0 < fewer < slots
        assert kept.driver.taken < taken
        assert kept.driver.free_memory() >= cuda.LOW_MEMORY
        hits = model.store.usage.device_hits
        assert_same_bits(model.logits(tokens(LENGTH), PREFILL), wanted, "afterwards")
        assert model.store.num_device_slots == fewer
        assert model.store.usage.device_hits > hits
        kept.driver.others += 16 << 20
        for _ in range(3):
            assert_same_bits(model.logits(tokens(LENGTH), PREFILL), wanted, "all of it")
        assert model.store.num_device_slots == 0
