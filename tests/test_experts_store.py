"""The store of experts: the answer never depends on where an expert lay; what fails costs one
error, and the next token works."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
from kernel_cases import assert_same_bits
from stored_models import Stored, expected, stored, tokens

from localr1.errors import CheckpointError, MemoryLimitError, TruncatedError
from localr1.experts.device import SimulatedDevice
from localr1.experts.ram import RamTier
from localr1.experts.store_options import StoreOptions

LENGTH = 48
MODELS = ("qwen3_moe", "deepseek_v3")
BUDGETS = (0.0, 0.1, 0.5, 1.0)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("ram", BUDGETS)
@pytest.mark.parametrize("device", [None, 0.1, 0.5, 1.0])
def test_the_answer_does_not_depend_on_where_experts_lie(
    model_type: str, ram: float, device: float | None
) -> None:
    """Of budgets, policies, threads, read-ahead, and a cache cold or warm: equal bits."""
    wanted = expected(model_type, LENGTH)
    cases = [
        (StoreOptions("adaptive"), 1),
        (StoreOptions("lru", read_ahead=True), 2),
        (StoreOptions("static", read_ahead=False), 3),
    ]
    counted = set()
    for options, threads in cases:
        with stored(model_type, ram, device, options, threads=threads) as cold:
            assert_same_bits(cold.logits(tokens(LENGTH)), wanted, (options, "cold"))
            assert_same_bits(cold.logits(tokens(LENGTH)), wanted, (options, "warm"))
            usage = cold.store.usage
            assert usage.passes == 2 * (LENGTH - 24 + 1)
            assert usage.tokens == 2 * LENGTH
            if ram == 1.0 and device is None:
                assert usage.reads == 0
            if ram + (device or 0.0) < 0.7:
                assert usage.reads > 0
            if device:  # The CPU may compute what lies there too: as it is measured.
                assert usage.device_hits + usage.spared > 0
            counted.add(usage.uses)
    assert len(counted) == 1, "an expert counts once, wherever it came from"


def test_a_prompt_in_any_chunks_is_the_same() -> None:
    """Passes of 1 token, of a few that are below the break-even, and of many that are streamed."""
    for prefill in (1, 3, 40):
        wanted = expected("deepseek_v3", LENGTH, prefill)
        with stored("deepseek_v3", 0.5, 0.3) as model:
            found = model.logits(tokens(LENGTH), prefill)
            assert_same_bits(found, wanted, prefill)


def test_hot_experts_move_to_the_device() -> None:
    """A conversation that keeps to the same tokens is served from the device in the end."""
    with stored("deepseek_v3", 1.0, 0.35) as model:
        same = torch.full((120,), 5)
        model.logits(same, 1)
        before = model.store.usage.copy()
        assert before.promotions > 0
        model.logits(same, 1)
        used = model.store.usage - before
        assert used.hit_rate > 0.95
        assert used.reads == 0


def test_what_the_device_drops_comes_back_to_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiers together hold most experts, so that little has to be read again."""
    wanted = expected("deepseek_v3", LENGTH)
    reads = []
    for is_dropped in (False, True):
        if is_dropped:
            monkeypatch.setattr(RamTier, "receive", lambda *_: False)
        with stored("deepseek_v3", 0.65, 0.25, StoreOptions(read_ahead=False)) as model:
            for _ in range(3):
                assert_same_bits(model.logits(tokens(LENGTH)), wanted, is_dropped)
            usage = model.store.usage
            reads.append(usage.reads)
            assert (usage.demotions == 0) == is_dropped
            assert usage.demotions <= usage.promotions
            moved = usage.promotions + usage.demotions + usage.streamed
            assert usage.link_bytes == moved * model.store.slot_bytes
            assert_nothing_is_held(model)
    assert reads[0] < 0.6 * reads[1]


@pytest.mark.parametrize("bandwidth", [1e5, 3e6])
def test_a_token_that_needs_what_is_coming_back_waits_for_it(bandwidth: float) -> None:
    wanted = expected("deepseek_v3", LENGTH)
    options = StoreOptions(read_ahead=False)
    with stored("deepseek_v3", 0.4, 0.3, options, bandwidth=bandwidth) as model:
        for _ in range(2):
            assert_same_bits(model.logits(tokens(LENGTH)), wanted, bandwidth)
        assert model.store.usage.demotions > 0
        model.store.available_memory = lambda: 0
        assert_same_bits(model.logits(tokens(LENGTH)), wanted, "short of memory")


def test_what_cannot_come_back_is_read() -> None:
    wanted = expected("deepseek_v3", LENGTH)
    with stored("deepseek_v3", 0.65, 0.25, StoreOptions(read_ahead=False)) as model:
        assert isinstance(model.store.devices[0], SimulatedDevice)
        failures = 0

        def download(slot: int, address: int, nbytes: int) -> "Future[float]":
            nonlocal failures
            failures += 1
            lost: Future[float] = Future()
            lost.set_exception(CheckpointError("the link is down"))
            return lost

        model.store.devices[0].download = download  # type: ignore[method-assign]
        for _ in range(3):
            assert_same_bits(model.logits(tokens(LENGTH)), wanted, "no copy came back")
        assert failures > 0
        assert model.store.usage.demotions == 0
        assert_nothing_is_held(model)


def test_static_placement_moves_nothing() -> None:
    with stored("deepseek_v3", 1.0, 0.3, StoreOptions("static")) as model:
        model.logits(tokens(LENGTH))
        assert model.store.usage.promotions == 0


def test_a_copy_takes_effect_between_passes_only() -> None:
    """A slow link: what is promoted is still computed from RAM until a later pass."""
    # 3.5 KB at 30 KB/s: a ninth of a second a copy, while a pass takes milliseconds.
    with stored("deepseek_v3", 1.0, 0.3, bandwidth=3e4) as model:
        model.logits(tokens(LENGTH))
        in_time = model.store.usage.promotions
        assert in_time < 40
    with stored("deepseek_v3", 1.0, 0.3) as model:
        model.logits(tokens(LENGTH))
        assert model.store.usage.promotions > in_time


@pytest.mark.parametrize("device", [None, 0.2])
@pytest.mark.parametrize("fail_at", [1, 2, 7, 30])
def test_a_read_that_fails_costs_one_error(device: float | None, fail_at: int) -> None:
    wanted = expected("deepseek_v3", LENGTH)
    error = TruncatedError("experts-001.safetensors: the file ends early", expected=8, found=4)
    options = StoreOptions(read_ahead=False)
    with stored("deepseek_v3", 0.2, device, options) as model:
        model.checkpoint.arm(error, fail_at)
        with pytest.raises(TruncatedError, match="ends early"):
            model.logits(tokens(LENGTH))
        assert model.checkpoint.reads >= fail_at
        for _ in range(2):
            assert_same_bits(model.logits(tokens(LENGTH)), wanted, "after the error")
        assert_nothing_is_held(model)


def test_every_read_may_fail() -> None:
    """A file that is gone: an error each time, and none that hangs."""
    wanted = expected("qwen3_moe", LENGTH)
    with stored("qwen3_moe", 0.2) as model:
        model.checkpoint.arm(CheckpointError("gone"), 1, failures=1 << 30)
        for _ in range(5):
            with pytest.raises(CheckpointError, match="gone"):
                model.logits(tokens(LENGTH))
        model.checkpoint.arm(CheckpointError("gone"), 1, failures=0)
        assert_same_bits(model.logits(tokens(LENGTH)), wanted, "after the errors")
        assert_nothing_is_held(model)


def test_an_error_of_a_read_ahead_is_told_when_it_matters() -> None:
    """What was read in vain may fail in silence; what is needed is read again, and told then."""
    wanted = expected("deepseek_v3", LENGTH)
    with stored("deepseek_v3", 0.3, options=StoreOptions(read_ahead=True)) as model:
        for fail_at in range(1, 20):
            model.checkpoint.arm(CheckpointError("bad sector"), fail_at)
            try:
                found = model.logits(tokens(LENGTH))
            except CheckpointError:
                continue
            assert_same_bits(found, wanted, fail_at)
        model.checkpoint.arm(CheckpointError("bad sector"), 1, failures=0)
        assert_same_bits(model.logits(tokens(LENGTH)), wanted, "after the errors")
        assert model.store.usage.prefetch_hits > 0


def assert_nothing_is_held(model: Stored) -> None:
    """No slot is lost to an error: all that are not being read into can be asked for."""
    ram = model.store.ram
    ram.drain()
    copies = 0 if model.store.hot is None else len(model.store.hot.uploads)
    assert ram.room == ram.residency.num_slots - copies


def test_slots_give_way_where_memory_runs_short() -> None:
    wanted = expected("deepseek_v3", LENGTH)
    with stored("deepseek_v3", 1.0) as model:
        slots = model.store.ram.residency.num_slots
        model.store.available_memory = lambda: 0
        assert_same_bits(model.logits(tokens(LENGTH)), wanted, "while it shrinks")
        fewer = model.store.ram.residency.num_slots
        assert fewer < slots
        model.store.available_memory = lambda: 1 << 40
        assert_same_bits(model.logits(tokens(LENGTH)), wanted, "afterwards")
        assert model.store.ram.residency.num_slots == fewer
        assert model.store.usage.reads > 0


def test_slots_give_way_while_experts_are_copied_from_them() -> None:
    """A slow link, so that promotions are under way whenever memory runs short."""
    wanted = expected("deepseek_v3", LENGTH)
    with stored("deepseek_v3", 1.0, 0.3, bandwidth=1e6) as model:
        slots = model.store.ram.residency.num_slots
        model.store.available_memory = lambda: 0
        for _ in range(3):
            assert_same_bits(model.logits(tokens(LENGTH)), wanted, "short of memory")
        assert model.store.ram.residency.num_slots < slots
        assert model.store.usage.promotions > 0


def test_slots_never_give_way_below_what_a_token_needs() -> None:
    wanted = expected("deepseek_v3", LENGTH)
    with stored("deepseek_v3", 0.3, 0.3) as model:
        model.store.available_memory = lambda: 0
        for _ in range(10):
            assert_same_bits(model.logits(tokens(LENGTH)), wanted, "short of memory")
        assert model.store.ram.residency.num_slots >= 6


def test_no_memory_for_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localr1.experts.store.SlotArena", NoMemory)
    with pytest.raises(MemoryLimitError, match="memory for experts"), stored("deepseek_v3", 1.0):
        pass


class NoMemory:
    """An arena that the system gives nothing."""

    size = 0

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes

    def resize(self, count: int) -> int:
        return 0


def test_spans_show_reading_beside_computing() -> None:
    with stored("deepseek_v3", 0.3, 0.3) as model:
        spans = model.store.record_spans()
        model.logits(tokens(LENGTH))
        kinds = {span.kind for span in spans}
        assert kinds == {"read", "compute", "device"}
        assert all(span.begin <= span.end for span in spans)


def test_the_end_closes_the_files_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with stored("deepseek_v3", 0.3, 0.3) as model:
        model.logits(tokens(LENGTH))
        assert threading.active_count() > before
    assert model.checkpoint.closed == 1
    deadline = time.monotonic() + 20.0
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
