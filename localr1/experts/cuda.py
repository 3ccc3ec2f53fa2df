"""Experts in the memory of an NVIDIA card, computed there by the kernels of cuda/gpu.

Two threads drive the card, each with a stream of its own: one copies experts in, one computes. What
they do to the card goes through a `Driver` (kernels/gpu_driver.py), so that the same code runs on
the tests' model of a card.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from localr1.errors import DeviceError, KernelError, LocalR1Error, MemoryLimitError
from localr1.experts.card_memory import CardSlots, Staging
from localr1.experts.card_rounds import MOST_PAIRS, CardRounds
from localr1.experts.device import STREAM_SLOTS, DeviceTimes, Streamed
from localr1.experts.options import CardSpec
from localr1.experts.placement import CARD_MARGIN
from localr1.kernels import gpu_launch
from localr1.kernels.gpu_driver import MODEL_PROGRAMS, NO_CARD, Driver, open_card
from localr1.kernels.gpu_layout import ExpertLayout, MatrixLayout
from localr1.kernels.gpu_program import ProgramCache
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import ExpertForm
from localr1.kernels.native_weight import SCALE_TYPES

STAGING_BYTES: Final = 4 << 20
"""Of pinned memory, twice (`Staging`)."""
CHUNK_BYTES: Final = 64 << 20
"""Of one allocation of slots."""
LOW_MEMORY: Final = 192 << 20
"""Bytes left on the card, of whatever programs, below which slots are given back."""


@dataclass
class _Bank:
    """A layer's experts. table: int64 [num_experts], the address of each on the card, 0 for none;
    on_card: where the card has its copy, which is old where is_old."""

    form: ExpertForm
    layout: ExpertLayout
    nbytes: int
    table: Tensor
    on_card: int = 0
    is_old: bool = True


class CudaDevice:
    """`Device` on a card. memory: bytes of it that experts may take. kernels: the CPU's, whose
    blocked bytes the card gets.

    Once the card has failed, every call that would need it raises DeviceError at once.
    """

    def __init__(self, driver: Driver, memory: int, kernels: NativeKernels) -> None:
        self.memory = memory
        self.driver = driver
        self.name = driver.name
        self._kernels = kernels
        self._banks: list[_Bank] = []
        self._slots: CardSlots | None = None
        self._streaming: CardSlots | None = None
        self._rounds: CardRounds | None = None
        self._lost: DeviceError | None = None
        self._is_closed = False
        self._computing = ThreadPoolExecutor(1, "localr1-card")
        self._copying = ThreadPoolExecutor(1, "localr1-link")
        driver.enter()
        self._copy_stream = driver.stream()
        self._staging: Staging | None = None

    @property
    def num_slots(self) -> int:
        return 0 if self._slots is None else self._slots.size

    def add_layer(self, form: ExpertForm, num_experts: int) -> int:
        """Raises KernelError for experts that the card's kernels cannot hold."""
        rows_per_block = self._kernels.rows_per_block
        shapes = [(form.inner, form.hidden)] * 2 + [(form.hidden, form.inner)]
        matrices = [
            MatrixLayout.of(rows, columns, rows_per_block, scheme, SCALE_TYPES[scales])
            for (rows, columns), scheme, scales in zip(
                shapes, form.schemes, form.scale_dtypes, strict=True
            )
        ]
        layout = ExpertLayout(*matrices)
        try:
            gpu_launch.gate_up(layout, 1)
        except KernelError as error:
            raise KernelError(
                error.what, expected=error.expected, found=error.found, fix=NO_CARD
            ) from None
        nbytes = int(self._kernels.expert_layout(form).nbytes)
        table = torch.zeros(num_experts, dtype=torch.int64)
        self._banks.append(_Bank(form, layout, nbytes, table))
        return len(self._banks) - 1

    def resize(self, num_slots: int) -> int:
        """Raises MemoryLimitError where the card has no room for what computing takes, or for a
        single expert though some were asked for."""
        self.driver.enter()
        if self._slots is None:
            self._prepare()
        assert self._slots is not None
        room = max(0, self.memory // self._slots.slot_bytes - STREAM_SLOTS)
        found = self._slots.resize(min(num_slots, room))
        if num_slots and not found:
            raise self._no_room((STREAM_SLOTS + 1) * self._slots.slot_bytes)
        return found

    def shortage(self) -> int:
        if self._lost is not None:
            return 0
        self.driver.enter()
        return max(0, LOW_MEMORY - self.driver.free_memory())

    def upload(self, address: int, nbytes: int, slot: int | None) -> "Future[float]":
        assert self._slots is not None
        assert self._streaming is not None
        target = self._streaming.address(0) if slot is None else self._slots.address(slot)
        return self._copying.submit(self._copy, address, target, nbytes)

    def download(self, slot: int, address: int, nbytes: int) -> "Future[float]":
        assert self._slots is not None
        return self._copying.submit(self._copy_back, self._slots.address(slot), address, nbytes)

    def place(self, layer: int, expert: int, slot: int | None) -> None:
        """The card gets the table before the layer is computed next."""
        assert self._slots is not None
        bank = self._banks[layer]
        bank.table[expert] = 0 if slot is None else self._slots.address(slot)
        bank.is_old = True

    def compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
    ) -> "Future[DeviceTimes]":
        return self._computing.submit(self._compute, layer, x, chosen, streamed, outputs)

    def bank(self, layer: int) -> tuple[ExpertLayout, int]:
        """How the layer's experts lie in their slots, and where the card has its copy of the table,
        for a computation of somebody else's. Of use once slots were asked for."""
        bank = self._banks[layer]
        assert bank.on_card
        return bank.layout, bank.on_card

    def refresh(self, stream: Any) -> None:
        """Tables that have changed go to the card, in the order of this stream. No table may change
        before what the stream was given is done."""
        if self._lost is not None:
            raise self._lost
        for bank in self._banks:
            if bank.is_old:
                table = bank.table
                self.driver.copy_in(bank.on_card, table.data_ptr(), table.nbytes, stream)
                bank.is_old = False

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._computing.shutdown()
        self._copying.shutdown()
        # A card that is lost frees nothing any more, and need not.
        with contextlib.suppress(LocalR1Error):
            self.driver.enter()
            self._release()
        self.driver.close()

    def _prepare(self) -> None:
        """All that computing takes beside the slots, once the layers are known."""
        slot_bytes = max(bank.nbytes for bank in self._banks)
        hidden = max(bank.form.hidden for bank in self._banks)
        inner = max(bank.form.inner for bank in self._banks)
        experts = max(len(bank.table) for bank in self._banks)
        try:
            self._rounds = CardRounds(self.driver, hidden, inner, experts)
            for bank in self._banks:
                bank.on_card = self._rounds.allocate(8 * len(bank.table))
            streaming = CardSlots(self.driver, slot_bytes, CHUNK_BYTES)
            self._streaming = streaming
            if streaming.resize(STREAM_SLOTS) < STREAM_SLOTS:
                raise self._no_room(STREAM_SLOTS * slot_bytes)
        except MemoryLimitError:
            self._release()
            raise self._no_room(STREAM_SLOTS * slot_bytes) from None
        self._slots = CardSlots(self.driver, slot_bytes, CHUNK_BYTES)
        self._staging = Staging(self.driver, STAGING_BYTES)

    def _release(self) -> None:
        for slots in (self._slots, self._streaming):
            if slots is not None:
                slots.resize(0)
        if self._rounds is not None:
            self._rounds.free()
        if self._staging is not None:
            self._staging.free()
            self._staging = None

    def _no_room(self, nbytes: int) -> MemoryLimitError:
        return MemoryLimitError(
            f"{self.name}: memory for experts",
            expected=f"{nbytes / 2**20:.0f} MiB for the least number of them, and "
            f"{CARD_MARGIN / 2**20:.0f} MiB to work with",
            found=f"{self.driver.free_memory() / 2**20:.0f} MiB free of the card's, and "
            f"{self.memory / 2**20:.0f} MiB allowed",
            fix="Close other programs, or leave --device out.",
        )

    def _fail(self, error: LocalR1Error, during: str) -> DeviceError:
        """The card is not used any more; the first error is the one to be told."""
        if self._lost is None:
            self._lost = DeviceError(f"{self.name}: {during}", found=error)
        return self._lost

    def _copy(self, source: int, target: int, nbytes: int) -> float:
        """From RAM to the card."""
        assert self._staging is not None
        with self._copying_of(nbytes, "to") as begin:
            self._staging.copy_in(target, source, nbytes, self._copy_stream)
        return time.perf_counter() - begin

    def _copy_back(self, source: int, target: int, nbytes: int) -> float:
        """From the card to RAM."""
        assert self._staging is not None
        with self._copying_of(nbytes, "from") as begin:
            self._staging.copy_out(target, source, nbytes, self._copy_stream)
        return time.perf_counter() - begin

    @contextlib.contextmanager
    def _copying_of(self, nbytes: int, direction: str) -> Iterator[float]:
        """When it began; what fails is the end of the card."""
        if self._lost is not None:
            raise self._lost
        try:
            self.driver.enter()
            yield time.perf_counter()
        except LocalR1Error as error:
            during = f"copying an expert of {nbytes} bytes {direction} the card"
            raise self._fail(error, during) from None

    def _compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
    ) -> DeviceTimes:
        if self._lost is not None:
            raise self._lost
        bank = self._banks[layer]
        copies: list[Future[float]] = []
        try:
            self.driver.enter()
            return self._compute_all(bank, x, chosen, streamed, outputs, copies)
        except LocalR1Error as error:
            form = bank.form
            raise self._fail(
                error,
                f"gate_up_{form.schemes[0].code_name} and down_{form.schemes[2].code_name} of "
                f"{x.shape[0]} tokens with {chosen.shape[1]} experts each of "
                f"{form.inner} x {form.hidden}",
            ) from None
        finally:
            wait(copies)  # They read what may be written over once this is over.

    def _compute_all(
        self,
        bank: _Bank,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
        copies: "list[Future[float]]",
    ) -> DeviceTimes:
        """copies: every copy that was begun."""
        rounds = self._rounds
        assert rounds is not None
        begin, waited = time.perf_counter(), 0.0
        for index, each in enumerate(streamed[:STREAM_SLOTS]):
            copies.append(self._stream(each, index, bank))
        if bank.is_old:
            rounds.copy_table(bank.table, bank.on_card)
            bank.is_old = False
        here = (chosen >= 0) & (bank.table != 0)[chosen.clamp_min(0)]
        kept = chosen.where(here, -1)
        at_once = max(1, MOST_PAIRS // chosen.shape[1])
        for first in range(0, len(x), at_once):
            some = slice(first, first + at_once)
            if here[some].any():
                found = rounds.run(bank.layout, bank.on_card, x[some], kept[some])
                outputs[some][here[some]] = found[here[some]]
        resident = time.perf_counter() - begin
        for index, each in enumerate(streamed):
            asked = time.perf_counter()
            copies[index].result()
            waited += time.perf_counter() - asked
            self._compute_streamed(bank, index, each.expert, x, chosen, outputs)
            following = index + STREAM_SLOTS
            if following < len(streamed):
                copies.append(self._stream(streamed[following], following, bank))
        return DeviceTimes(resident, time.perf_counter() - begin - resident - waited, waited)

    def _compute_streamed(
        self, bank: _Bank, index: int, expert: int, x: Tensor, chosen: Tensor, outputs: Tensor
    ) -> None:
        """Of the tokens that chose it alone."""
        rounds = self._rounds
        assert rounds is not None
        assert self._streaming is not None
        table = torch.zeros_like(bank.table)
        table[expert] = self._streaming.address(index % STREAM_SLOTS)
        rounds.copy_table(table, rounds.passing_table)
        tokens, places = torch.nonzero(chosen == expert, as_tuple=True)
        for first in range(0, len(tokens), MOST_PAIRS):
            some = tokens[first : first + MOST_PAIRS]
            only = torch.full((len(some), 1), expert)
            found = rounds.run(bank.layout, rounds.passing_table, x[some], only)
            outputs[some, places[first : first + MOST_PAIRS]] = found[:, 0]

    def _stream(self, each: Streamed, index: int, bank: _Bank) -> "Future[float]":
        assert self._streaming is not None
        target = self._streaming.address(index % STREAM_SLOTS)
        return self._copying.submit(self._copy, each.address, target, bank.nbytes)


def open_cuda(programs: ProgramCache, spec: CardSpec, kernels: NativeKernels) -> CudaDevice:
    """A card of this machine. Raises what `open_card` raises, and MemoryLimitError where it has not
    so much memory."""
    driver = open_card(programs, kernels.rows_per_block, MODEL_PROGRAMS, spec.number)
    try:
        driver.enter()
        return CudaDevice(driver, memory_to_take(driver, spec.memory), kernels)
    except BaseException:
        driver.close()
        raise


def memory_to_take(driver: Driver, asked: int | None) -> int:
    """Bytes of the card, as many as were asked for; for None what is free, less CARD_MARGIN. Raises
    MemoryLimitError where there is not so much."""
    most = max(0, driver.free_memory() - CARD_MARGIN)
    if asked is not None and asked > most:
        raise MemoryLimitError(
            "--device",
            expected=f"at most {most / 2**30:.1f} GiB, what {driver.name} has free but for "
            f"{CARD_MARGIN / 2**20:.0f} MiB",
            found=f"{asked / 2**30:.1f} GiB",
        )
    return most if asked is None else asked
