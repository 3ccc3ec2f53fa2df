"""The device of NVIDIA cards by itself, on the model of a card: what lies in its slots and what is
streamed gets the CPU's bits; whatever fails is one error, and nothing is left on the card."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from driver_model import ModelDriver
from gpu_model import skip_where_there_is_no_model
from kernel_cases import assert_same_bits, native, random_tokens
from test_kernels_experts import Case
from torch import Tensor

from localr1.errors import DeviceError, KernelError, LocalR1Error, MemoryLimitError
from localr1.experts import card_rounds, cuda
from localr1.experts.card_memory import CardSlots
from localr1.experts.cuda import CudaDevice
from localr1.experts.device import STREAM_SLOTS, Streamed
from localr1.kernels.native import available_isas
from localr1.kernels.native_experts import ExpertForm, NativeExperts

CASE = Case(6, 3, 64, 32, 5)
UNTOUCHED = 7.0


class Setup:
    """Six experts in RAM, and a card with room for three of them beside its buffers."""

    def __init__(self, driver: ModelDriver | None = None, case: Case = CASE, isa: str = "") -> None:
        skip_where_there_is_no_model()
        generator = torch.Generator().manual_seed(0)
        self.case = case
        packed = case.packed(generator)
        self.kernels = native(isa or available_isas()[0], 1)
        bank = self.kernels.prepare_experts(packed, len(packed))
        assert isinstance(bank, NativeExperts)
        self.bank = bank
        self.nbytes = int(bank.layout.nbytes)
        self.x = random_tokens(case.tokens, case.hidden, generator)
        first = torch.arange(4, 4 + case.tokens)[:, None]  # Expert 4 is the first token's first.
        self.chosen = (first + torch.arange(case.per_token)) % case.experts
        if case.tokens > 1:
            self.chosen[1, 0] = -1
        self.driver = driver or ModelDriver(self.kernels.rows_per_block)
        self.form = ExpertForm.of(packed[0])
        self.device = CudaDevice(self.driver, (3 + STREAM_SLOTS) * self.nbytes, self.kernels)
        self.layer = self.device.add_layer(self.form, len(packed))

    def upload(self, expert: int, slot: int) -> float:
        address = int(self.bank.table[expert])
        return self.device.upload(address, self.nbytes, slot).result()

    def put(self, expert: int, slot: int) -> None:
        self.upload(expert, slot)
        self.device.place(self.layer, expert, slot)

    def computed(self, streamed: tuple[int, ...] = ()) -> Tensor:
        outputs = torch.full((*self.chosen.shape, self.case.hidden), UNTOUCHED)
        passing = [Streamed(expert, int(self.bank.table[expert])) for expert in streamed]
        self.device.compute(self.layer, self.x, self.chosen, passing, outputs).result()
        return outputs

    def expected(self, experts: tuple[int, ...]) -> Tensor:
        """Outputs of these experts, UNTOUCHED for all others."""
        outputs = torch.full((*self.chosen.shape, self.case.hidden), UNTOUCHED)
        kept = torch.isin(self.chosen, torch.tensor(experts, dtype=torch.int64))
        chosen = self.chosen.where(kept, -1)
        self.kernels.expert_outputs(self.x, chosen, self.bank, outputs)
        return outputs


@contextmanager
def opened(driver: ModelDriver | None = None, case: Case = CASE, isa: str = "") -> Iterator[Setup]:
    setup = Setup(driver, case, isa)
    try:
        yield setup
    finally:
        setup.device.close()


def test_only_what_is_placed_is_computed() -> None:
    with opened() as setup:
        assert setup.device.resize(10) == 3
        setup.upload(1, 0)
        setup.upload(2, 2)
        assert_same_bits(setup.computed(), setup.expected(()), "nothing is placed")
        setup.device.place(setup.layer, 1, 0)
        setup.device.place(setup.layer, 2, 2)
        assert_same_bits(setup.computed(), setup.expected((1, 2)), "two")
        setup.device.place(setup.layer, 1, None)
        assert_same_bits(setup.computed(), setup.expected((2,)), "one was taken away")
        setup.put(0, 0)
        assert_same_bits(setup.computed(), setup.expected((0, 2)), "another in its slot")


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(
    "case",
    [
        Case(6, 3, 64, 32, 1, bits=(4, 4, 8)),
        Case(6, 3, 96, 64, 3, bits=(8, 8, 4)),
        Case(6, 2, 64, 32, 9),
        Case(6, 3, 96, 160, 40, bits=(8, 8, 4)),
        Case(6, 3, 128, 64, 2, bits=(8, 8, 4), group=64, zero=True, dtype=torch.float16),
    ],
)
@pytest.mark.parametrize(("pinned", "eager"), [(True, False), (True, True), (False, False)])
def test_the_bits_are_those_of_the_cpu(case: Case, isa: str, pinned: bool, eager: bool) -> None:
    """Of row blocks as each instruction set lays them out, with and without pinned memory, on a
    card that does everything as late as it may and on one that does it at once."""
    rows = native(isa, 1).rows_per_block
    with opened(ModelDriver(rows, seed=1, pinned=pinned, eager=eager), case, isa) as setup:
        setup.device.resize(3)
        setup.put(4, 1)
        setup.put(0, 2)
        assert_same_bits(setup.computed(), setup.expected((0, 4)), "placed")
        found = setup.computed((1, 2, 3, 5))
        assert_same_bits(found, setup.expected((0, 1, 2, 3, 4, 5)), "placed and streamed")


def test_more_pairs_than_the_buffers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few tokens each; an expert that is streamed as well."""
    monkeypatch.setattr(cuda, "MOST_PAIRS", 7)
    monkeypatch.setattr(card_rounds, "MOST_PAIRS", 7)
    with opened(case=Case(6, 3, 64, 32, 20)) as setup:
        setup.device.resize(3)
        setup.put(4, 0)
        found = setup.computed((1, 2))
        assert_same_bits(found, setup.expected((1, 2, 4)), "in rounds")


def test_experts_with_many_pairs_are_computed_in_tiles() -> None:
    """What is placed, and what is streamed; with few pairs each is computed by itself."""
    for tokens, in_tiles in ((1, False), (25, True)):
        with opened(case=Case(6, 3, 64, 32, tokens)) as setup:
            setup.device.resize(3)
            setup.put(4, 0)
            found = setup.computed((5,))
            assert_same_bits(found, setup.expected((4, 5)), tokens)
            assert setup.driver.launched.count("gate_up_tiles_int4") == 2 * in_tiles
            assert setup.driver.launched.count("down_int4") == 2 * (not in_tiles)


def test_copies_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half of the staging memory is filled again only when its copy is over."""
    monkeypatch.setattr(cuda, "STAGING_BYTES", 256)
    with opened() as setup:
        assert setup.nbytes > 5 * 256
        setup.device.resize(3)
        setup.put(4, 0)
        setup.put(5, 1)
        assert_same_bits(setup.computed(), setup.expected((4, 5)), "pieces")


def test_a_token_of_hits_waits_for_the_card_once() -> None:
    """And once more where the table changed since the last pass."""
    with opened() as setup:
        setup.device.resize(3)
        setup.put(4, 0)
        for synchronized in (2, 1, 1):
            setup.driver.calls = {}
            setup.computed()
            assert setup.driver.calls["synchronize"] == synchronized
            assert setup.driver.calls["launch"] == 3
    assert setup.driver.launched[:3] == ["quantize_activations", "gate_up_int4", "down_int4"]


def test_slots_lie_in_several_allocations_and_go_with_them() -> None:
    skip_where_there_is_no_model()
    driver = ModelDriver()
    driver.enter()
    slots = CardSlots(driver, 64, chunk_bytes=200)
    assert slots.resize(8) == 8
    addresses = [slots.address(slot) for slot in range(8)]
    assert len(set(addresses)) == 8
    assert all(address % 16 == 0 for address in addresses)
    assert driver.taken == 8 * 64
    assert slots.resize(7) == 7
    assert driver.taken == 8 * 64  # Half of an allocation cannot be given back.
    assert slots.resize(6) == 6
    assert driver.taken == 6 * 64
    assert [slots.address(slot) for slot in range(6)] == addresses[:6]
    assert slots.resize(0) == 0
    assert driver.taken == 0
    small = ModelDriver(total=5 * 64)
    small.enter()
    assert CardSlots(small, 64, chunk_bytes=128).resize(8) == 4


def test_memory_may_end_at_every_allocation() -> None:
    """Fewer slots, or an error that says how much is missing; nothing is left on the card, and
    another try finds all that it needs."""
    reached, at, told = False, 0, ""
    while not reached:
        at += 1
        with opened() as setup:
            setup.driver.arm("allocate", at, MemoryLimitError("model: allocate"))
            try:
                setup.device.resize(3)
                reached = setup.driver.calls["allocate"] < at
            except MemoryLimitError as error:
                told = str(error)
            if not reached:
                assert setup.device.num_slots == 0
                assert setup.device.resize(3) == 3
            setup.put(4, 0)
            assert_same_bits(setup.computed(), setup.expected((4,)), "all is there")
        assert setup.driver.taken == 0
        assert setup.driver.num_pinned == 0
        assert setup.driver.closed == 1
    assert at > 10
    assert "model: memory for experts: expected" in told


ILLEGAL = DeviceError("model: cuStreamSynchronize", found="ILLEGAL_ADDRESS")


@pytest.mark.parametrize(
    ("kind", "at", "words"),
    [
        ("launch", 1, "gate_up_int4 and down_int4 of 5 tokens with 3 experts each of 32 x 64"),
        ("launch", 2, "gate_up_int4 and down_int4 of 5 tokens"),
        ("launch", 3, "gate_up_int4 and down_int4 of 5 tokens"),
        ("synchronize", 1, "gate_up_int4 and down_int4 of 5 tokens"),
        ("copy_out", 1, "ILLEGAL_ADDRESS"),
        ("enter", 1, "ILLEGAL_ADDRESS"),
    ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_card_that_fails_says_what_it_was_doing(
    kind: str, at: int, words: str, lost: bool
) -> None:
    with opened() as setup:
        setup.device.resize(3)
        setup.put(4, 0)
        setup.driver.arm(kind, at, ILLEGAL, lost=lost)
        with pytest.raises(DeviceError, match=words):
            setup.computed((1, 2))
        with pytest.raises(DeviceError, match=words):
            setup.computed()
        with pytest.raises(DeviceError, match=words):
            setup.upload(3, 1)
        assert setup.device.shortage() == 0
    assert setup.driver.closed == 1


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("piece", [256, cuda.STAGING_BYTES])
def test_an_expert_comes_back_before_another_takes_its_slot(
    monkeypatch: pytest.MonkeyPatch, piece: int, pinned: bool
) -> None:
    monkeypatch.setattr(cuda, "STAGING_BYTES", piece)
    rows = native(available_isas()[0], 1).rows_per_block
    with opened(ModelDriver(rows, pinned=pinned)) as setup:
        setup.device.resize(1)
        setup.upload(1, 0)
        back = torch.zeros(setup.nbytes, dtype=torch.uint8)
        saved = setup.device.download(0, back.data_ptr(), setup.nbytes)
        setup.put(4, 0)
        saved.result()
        original = ctypes.string_at(int(setup.bank.table[1]), setup.nbytes)
        assert bytes(back.tolist()) == original
        assert_same_bits(setup.computed(), setup.expected((4,)), "the other in its slot")


@pytest.mark.parametrize("kind", ["copy_out", "synchronize"])
def test_a_copy_back_that_fails(kind: str) -> None:
    with opened() as setup:
        setup.device.resize(3)
        setup.driver.arm(kind, 1, ILLEGAL)
        back = torch.zeros(setup.nbytes, dtype=torch.uint8)
        with pytest.raises(DeviceError, match=f"copying an expert of {setup.nbytes} bytes from"):
            setup.device.download(0, back.data_ptr(), setup.nbytes).result()


@pytest.mark.parametrize("kind", ["enter", "copy_in", "record", "synchronize"])
def test_a_copy_that_fails(kind: str) -> None:
    with opened() as setup:
        setup.device.resize(3)
        setup.driver.arm(kind, 1, ILLEGAL)
        with pytest.raises(DeviceError, match=f"copying an expert of {setup.nbytes} bytes"):
            setup.upload(3, 1)


def test_a_kernel_that_reads_outside_is_an_error_of_the_device() -> None:
    """A table that points nowhere: what a card calls an illegal address."""
    with opened() as setup:
        setup.device.resize(3)
        setup.device.place(setup.layer, 4, 2)
        setup.device._banks[0].table[4] += 1 << 12
        with pytest.raises(DeviceError, match="gate_up_int4"):
            setup.computed()


def test_experts_that_the_kernels_cannot_hold() -> None:
    """Gate of 8 bits beside up of 4."""
    other = Case(6, 3, 64, 32, 1, bits=(8, 4, 4)).packed(torch.Generator().manual_seed(0))
    form = ExpertForm.of(other[0])
    with opened() as setup, pytest.raises(KernelError, match="Leave --device and --devices out"):
        setup.device.add_layer(form, 6)


def test_what_others_take_is_a_shortage() -> None:
    with opened(ModelDriver(total=cuda.LOW_MEMORY + (64 << 20))) as setup:
        setup.device.resize(3)
        assert setup.device.shortage() == 0
        setup.driver.others = 128 << 20
        assert (64 << 20) <= setup.device.shortage() < (80 << 20)


def test_closing_a_lost_card_is_no_error() -> None:
    setup = Setup()
    setup.device.resize(1)
    setup.driver.arm("enter", 1, ILLEGAL, lost=True)
    setup.device.close()
    setup.device.close()
    assert setup.driver.closed == 1
    assert issubclass(DeviceError, LocalR1Error)
