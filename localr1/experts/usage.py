"""What the expert store did, counted: from where experts came, what was moved, what was waited
for. Pure Python."""

from dataclasses import dataclass, fields

BOUNDS = ("compute", "RAM", "device", "link", "disk")


@dataclass
class ExpertUsage:
    """Of some passes. An expert counts once a pass and layer, however many tokens chose it.

    device_hits, ram_hits, reads: experts computed on the device, from RAM, and read from their file
    first. streamed: of those on the device, how many were copied there for the pass. spared: of
    those from RAM, how many lay on the device as well, which had enough to do. prefetched: reads
    begun before the router asked; prefetch_hits: of these, those it then asked for.
    *_bytes: of the experts read where they were computed, copied over the link, read from files;
    what was read ahead in vain is part of disk_bytes. promotions: experts moved into the device;
    demotions: of those that made room for them, how many were moved back into RAM.
    seconds: of the passes, of which ram_seconds computing experts from RAM, device_seconds waiting
    for the device's results, link_seconds waiting for experts streamed to it, disk_seconds waiting
    for files. The rest is attention, routers, shared experts and all else.
    """

    passes: int = 0
    tokens: int = 0
    device_hits: int = 0
    ram_hits: int = 0
    reads: int = 0
    streamed: int = 0
    spared: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    promotions: int = 0
    demotions: int = 0
    device_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    link_bytes: int = 0
    seconds: float = 0.0
    ram_seconds: float = 0.0
    device_seconds: float = 0.0
    link_seconds: float = 0.0
    disk_seconds: float = 0.0

    @property
    def uses(self) -> int:
        return self.device_hits + self.ram_hits + self.reads

    @property
    def hit_rate(self) -> float:
        """Share of uses that found the expert in the fastest tier there is below the files: on the
        device where there is one, else in RAM. 0 where nothing was used."""
        on_device = self.device_hits - self.streamed + self.spared
        hits = on_device if self.device_hits or self.spared else self.ram_hits
        return hits / self.uses if self.uses else 0.0

    @property
    def memory_rate(self) -> float:
        """Share of uses that needed no file."""
        return 1.0 - self.reads / self.uses if self.uses else 0.0

    @property
    def bound(self) -> str:
        """What most of the time went into, one of BOUNDS."""
        waits = {
            "RAM": self.ram_seconds,
            "device": self.device_seconds,
            "link": self.link_seconds,
            "disk": self.disk_seconds,
        }
        waits["compute"] = self.seconds - sum(waits.values())
        return max(waits, key=lambda name: waits[name])

    def __sub__(self, earlier: "ExpertUsage") -> "ExpertUsage":
        """What was added since `earlier`, a copy of the same counters."""
        return ExpertUsage(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        )

    def copy(self) -> "ExpertUsage":
        return ExpertUsage(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Span:
    """Something that took time: kind "compute", "read", "upload" or "device"; begin, end in seconds
    of time.perf_counter. layer, expert: of what, None for several."""

    kind: str
    begin: float
    end: float
    layer: int
    expert: int | None
