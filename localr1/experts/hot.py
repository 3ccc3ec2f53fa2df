"""The tier of experts on a device, or on several, above RAM: which lie there, and what is on its
way.

Copies run in the background; tables change between passes only, in the thread of the engine.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from localr1.experts.beneath import Beneath
from localr1.experts.device import Device
from localr1.experts.ram import RamTier
from localr1.experts.residency import Promotion, Residency
from localr1.experts.schedule import Rates
from localr1.experts.usage import ExpertUsage


@dataclass(frozen=True)
class Upload:
    promotion: Promotion
    future: "Future[float]"


class DeviceTier:
    """Of one device. residency: whose slots these are. on_device: bool [layers, experts], what lies
    on any; changed here alone, of which `beneath`, RAM's ranking, is told. ram: where copies come
    from. rates: seconds of an expert there and here, where they were measured."""

    def __init__(
        self,
        device: Device,
        residency: Residency,
        on_device: NDArray[np.bool_],
        beneath: Beneath,
        ram: RamTier,
        usage: ExpertUsage,
    ) -> None:
        self.device = device
        self.residency = residency
        self.rates: Rates | None = None
        self.uploads: list[Upload] = []
        self._downloads: list[Future[float]] = []
        self._on_device = on_device
        self._beneath = beneath
        self._ram = ram
        self._usage = usage

    def open(self, num_slots: int) -> None:
        """Make room for so many experts, or for as many as the device has."""
        self.residency.grow(self.device.resize(num_slots))

    def make_room_for(self, keys: Sequence[int]) -> None:
        """Drop what is worth the least for those of `keys` that are absent. No copy may be on its
        way."""
        for key in self.residency.make_room_for(keys):
            self._move(*self._place_of(key), None)

    def fill(self, keys: Sequence[int] | None = None) -> Iterator[int]:
        """Copy experts into all free slots, these or the best first, each by way of RAM, which
        keeps none of them; yields bytes as they are there. Raises what reading raises."""
        residency = self.residency
        for promotion in residency.warm_start() if keys is None else residency.reserve(keys):
            layer, expert = promotion.layer, promotion.expert
            if not self._ram.holds(layer, expert):
                self._ram.request(layer, expert)
                self._ram.wait_for_any(needed=True)
            self._upload(promotion).result()
            self._complete(promotion)
            self._ram.drop(layer, expert)
            yield self._ram.arena.slot_bytes

    def finish(self) -> None:
        """What was copied since the last pass lies on the device from now on. Raises the error of a
        copy that failed, once all others are in place."""
        done = [upload for upload in self.uploads if upload.future.done()]
        failed = [upload for upload in done if upload.future.exception() is not None]
        for upload in done:
            self.uploads.remove(upload)
            self._ram.unpin(upload.promotion.layer, upload.promotion.expert)
            if upload in failed:
                self.residency.cancel(upload.promotion)
                continue
            self._complete(upload.promotion)
            self._usage.promotions += 1
            self._usage.link_bytes += self._ram.arena.slot_bytes
        for upload in (*failed, *done):
            seconds = upload.future.result()
            if self.rates is not None:
                self.rates.observe_link(1, seconds)

    def settle(self) -> None:
        """`finish`, once all copies are over."""
        wait([upload.future for upload in self.uploads])
        self.finish()

    def await_downloads(self) -> None:
        """Until all that was dropped lies in RAM: for who must not wait for the device later. An
        error is that of who needs the expert."""
        wait(self._downloads)
        self._downloads.clear()

    def promote(self, least_room: int) -> None:
        """Begin to copy what is worth it. least_room: slots of RAM that a pass must find free of
        copies. What the device drops is copied back where RAM holds something worth less: else it
        would be read from its file when it is needed again."""
        promotions = self.residency.promotions()
        for promotion in promotions:
            if promotion.evicted_key is not None:
                self._move(*self._place_of(promotion.evicted_key), None)
        begun: list[Promotion] = []
        for promotion in promotions:
            is_short = self._ram.room <= least_room
            if is_short or not self._ram.holds(promotion.layer, promotion.expert):
                self.residency.cancel(promotion)
                continue
            self._ram.pin(promotion.layer, promotion.expert)
            begun.append(promotion)
        # First, as the next token may need one of them.
        self._demote(begun, least_room)
        self.uploads += [Upload(promotion, self._upload(promotion)) for promotion in begun]

    def give_way(self) -> None:
        """Give slots back where other programs take of the device's memory. What lay in them is
        read again when it is needed, unless RAM has it."""
        slots = self.residency.num_slots
        short = self.device.shortage() if slots else 0
        if short <= 0:
            return
        self.settle()
        # At least a sixteenth: memory is given back in large pieces.
        fewer = max(-(-short // self._ram.arena.slot_bytes), slots // 16)
        kept = max(slots - fewer, 0)
        for key in self.residency.shrink(kept):
            self._move(*divmod(key, self.residency.num_experts), None)
        self.device.resize(kept)

    def lose(self) -> None:
        """The device failed: nothing lies there, nor will."""
        wait([upload.future for upload in self.uploads])
        for upload in self.uploads:
            self._ram.unpin(upload.promotion.layer, upload.promotion.expert)
            self.residency.cancel(upload.promotion)
        self.uploads.clear()
        self.rates = None
        self.residency.shrink(0)
        self._on_device[:] = False
        self._beneath.moved()

    def stop(self) -> None:
        """Copies are waited for; their errors are nobody's."""
        wait([upload.future for upload in self.uploads])
        self.device.close()

    def _demote(self, promotions: Sequence[Promotion], least_room: int) -> None:
        """Copy back who made room for them, and is in no other place."""
        slots = {
            promotion.evicted_key: promotion.slot
            for promotion in promotions
            if promotion.evicted_key is not None
            and not self._ram.holds(*self._place_of(promotion.evicted_key))
        }
        if not slots:
            return
        scores = self._ram.residency.ranking.score(np.array(list(slots), np.int64)).tolist()
        for (key, slot), score in zip(slots.items(), scores, strict=True):
            if self._ram.room > least_room:
                self._ram.receive(*self._place_of(key), score, partial(self._download, slot))

    def _download(self, slot: int, address: int) -> "Future[float]":
        download = self.device.download(slot, address, self._ram.arena.slot_bytes)
        self._downloads = [each for each in self._downloads if not each.done()] + [download]
        return download

    def _place_of(self, key: int) -> tuple[int, int]:
        return divmod(key, self.residency.num_experts)

    def _upload(self, promotion: Promotion) -> "Future[float]":
        address = self._ram.address(promotion.layer, promotion.expert)
        return self.device.upload(address, self._ram.arena.slot_bytes, promotion.slot)

    def _complete(self, promotion: Promotion) -> None:
        self.residency.complete(promotion)
        self._move(promotion.layer, promotion.expert, promotion.slot)

    def _move(self, layer: int, expert: int, slot: int | None) -> None:
        self.device.place(layer, expert, slot)
        self._on_device[layer, expert] = slot is not None
        self._beneath.moved()
