"""The tiers of several devices, of which each takes the experts of some layers."""

from collections.abc import Iterator, Sequence

from localr1.experts.hot import DeviceTier, Upload
from localr1.experts.schedule import Rates


class DeviceTiers:
    """tiers: of each device. homes: by layer, the number of the tier that takes its experts. What
    is done is done with all of them, as `DeviceTier` does it; a device that fails is the end of
    all."""

    def __init__(self, tiers: Sequence[DeviceTier], homes: Sequence[int]) -> None:
        self.tiers = list(tiers)
        self._homes = list(homes)

    def of_layer(self, layer: int) -> DeviceTier:
        return self.tiers[self._homes[layer]]

    @property
    def num_slots(self) -> int:
        return sum(tier.residency.num_slots for tier in self.tiers)

    @property
    def uploads(self) -> list[Upload]:
        """On their way, to any device."""
        return [upload for tier in self.tiers for upload in tier.uploads]

    @property
    def resident_keys(self) -> list[int]:
        """Of the experts that any holds."""
        return [key for tier in self.tiers for key in tier.residency.resident_keys.tolist()]

    def open(self, num_slots: Sequence[int]) -> None:
        """Of each device, at most as many as its layers have experts."""
        for number, (tier, slots) in enumerate(zip(self.tiers, num_slots, strict=True)):
            tier.open(min(slots, self._homes.count(number) * tier.residency.num_experts))

    def make_room_for(self, keys: Sequence[int]) -> None:
        for tier in self.tiers:
            tier.make_room_for(keys)

    def fill(self, keys: Sequence[int] | None = None) -> Iterator[int]:
        for tier in self.tiers:
            yield from tier.fill(keys)

    def finish(self) -> None:
        for tier in self.tiers:
            tier.finish()

    def settle(self) -> None:
        for tier in self.tiers:
            tier.settle()

    def await_downloads(self) -> None:
        for tier in self.tiers:
            tier.await_downloads()

    def promote(self, least_room: int) -> None:
        for tier in self.tiers:
            tier.promote(least_room)

    def give_way(self) -> None:
        for tier in self.tiers:
            tier.give_way()

    def lose(self) -> None:
        for tier in self.tiers:
            tier.lose()

    def stop(self) -> None:
        for tier in self.tiers:
            tier.stop()


def rates_of(hot: DeviceTiers | None, layer: int) -> Rates | None:
    """As measured on the layer's device; None without one."""
    return None if hot is None else hot.of_layer(layer).rates
