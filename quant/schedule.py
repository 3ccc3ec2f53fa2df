"""Which section needs which file of the source, and what that asks of the disk. Pure Python: never
imports torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Schedule:
    """needed: of each section in order, the files it reads. written: the bytes it adds to the
    output. sizes: bytes of every file of the source."""

    needed: tuple[frozenset[str], ...]
    written: tuple[int, ...]
    sizes: Mapping[str, int]

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The files that are needed, in the order they are first needed in: how to download them.
        Those of one section by name."""
        return tuple(dict.fromkeys(name for names in self.needed for name in sorted(names)))

    def remaining(self, begin: int) -> tuple[str, ...]:
        """Of `order` those that the sections from `begin` on need."""
        return tuple(name for name in self.order if self.last[name] >= begin)

    @cached_property
    def unused(self) -> tuple[str, ...]:
        """The files that nothing is made from, such as those of multi-token-prediction layers."""
        return tuple(sorted(self.sizes.keys() - set(self.order)))

    @cached_property
    def last(self) -> Mapping[str, int]:
        """Of each file that is needed, the number of the last section that reads it."""
        return {name: number for number, names in enumerate(self.needed) for name in names}

    @cached_property
    def first(self) -> Mapping[str, int]:
        numbers = range(len(self.needed) - 1, -1, -1)
        return {name: number for number in numbers for name in self.needed[number]}

    def gone_after(self, section: int) -> list[str]:
        """The files that this section was the last to read; unused ones with the first."""
        return [name for name in sorted(self.sizes) if self.last.get(name, 0) == section]

    def peak(self, there: Collection[str], *, releases: bool, begin: int = 0) -> int:
        """The most bytes that the disk must have free for the sections from `begin` on.

        there: files that are on it already; the others come when they are first needed, none
        earlier. releases: whether a file goes when its last section is done.
        """
        peak, written, freed = 0, 0, 0
        for number in range(begin, len(self.needed)):
            written += self.written[number]
            held = sum(
                size
                for name, size in self.sizes.items()
                if name not in there
                and self.first.get(name, number + 1) <= number
                and self.last[name] >= (number if releases else begin)
            )
            peak = max(peak, written + held - freed)
            if releases:
                freed += sum(self.sizes[name] for name in self.gone_after(number) if name in there)
        return peak


def make_schedule(
    needed: Sequence[Collection[str]], written: Sequence[int], sizes: Mapping[str, int]
) -> Schedule:
    return Schedule(tuple(map(frozenset, needed)), tuple(written), dict(sizes))
