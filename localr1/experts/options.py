"""What a user may ask of the experts' places, as he writes it. No torch."""

import re
from dataclasses import dataclass
from typing import Final

from localr1.checkpoint.paths import quoted
from localr1.errors import UsageError
from localr1.experts.budget import parse_size
from localr1.experts.policy import RANKINGS

EXAMPLE: Final = "simulated:24GiB,pcie=25GB/s,latency=10us,threads=1"
DEFAULT_LINK: Final = 25e9
"""Bytes a second: what PCIe 4.0 with 16 lanes carries of large copies."""
DEFAULT_LATENCY: Final = 1e-5
MAX_THREADS: Final = 1024
_CARD: Final = re.compile(r"([0-9]{1,2})(?::(?=.)|$)")
_RATE: Final = re.compile(r"(.+?)/s")
_LATENCY: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(us|ms|s)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class SimulatedSpec:
    """memory: bytes for experts. link_bandwidth: bytes a second. latency: seconds of a copy.
    threads: of the CPU that stand in for the device; None for half of all."""

    memory: int
    link_bandwidth: float = DEFAULT_LINK
    latency: float = DEFAULT_LATENCY
    threads: int | None = None


@dataclass(frozen=True)
class CardSpec:
    """number: CUDA's of an NVIDIA card. memory: bytes of it that may be taken, None for what is
    free."""

    number: int = 0
    memory: int | None = None


@dataclass(frozen=True)
class ExpertOptions:
    """ram, vram: the memory that experts may take there, "24GiB" or "50%" of them; None for what is
    free, less a margin. vram: of each card, or one after another with commas between. device: "cpu"
    for none, else as `parse_device` reads it. policy: which experts are kept where there is not
    room for all. read_ahead: guess what the next layer needs; None: while it pays. gpu_layers:
    layers that cards compute, routed experts aside; None for as many as they have room for.
    devices: several cards, as `parse_devices` reads it."""

    ram: str | None = None
    vram: str | None = None
    device: str = "cpu"
    policy: str = "adaptive"
    read_ahead: bool | None = None
    gpu_layers: int | None = None
    devices: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.policy not in RANKINGS:
            raise UsageError(
                "--policy",
                expected=f"one of {', '.join(RANKINGS)}",
                found=quoted(self.policy, 40),
            )
        if self.devices is not None and not self.cards:
            raise UsageError(
                "--devices", expected="NVIDIA cards", found=f"--device {quoted(self.device, 40)}"
            )
        if self.vram is not None and not self.names_a_device:
            raise UsageError(
                "--vram", expected="a device to hold it", found="none", fix="Give --device too."
            )
        if self.vram is not None and self.vram.count(",") not in (0, max(len(self.cards), 1) - 1):
            raise UsageError(
                "--vram",
                expected=f"an amount of all cards, or {len(self.cards)} with commas between"
                if self.devices is not None
                else "one amount: there is one device",
                found=quoted(self.vram, 40),
            )
        if self.gpu_layers is not None and not self.is_card:
            raise UsageError(
                "--gpu-layers",
                expected="an NVIDIA card to hold them",
                found=f"--device {quoted(self.device, 40)}",
                fix="Give --device cuda too.",
            )

    @property
    def cards(self) -> tuple[CardSpec, ...]:
        """In the order of the layers that they take; none without a card. Raises UsageError for a
        device that is none."""
        if self.devices is not None and self.device == "cpu":
            return parse_devices(self.devices, None)
        spec = parse_device(self.device)
        if not isinstance(spec, CardSpec):
            return ()
        if self.devices is None:
            return (spec,)
        if _CARD.match(self.device.strip().removeprefix("cuda:")):
            raise UsageError(
                "--device and --devices",
                expected="the cards in one of the two",
                found=f"{quoted(self.device, 40)} and {quoted(self.devices, 40)}",
            )
        return parse_devices(self.devices, spec.memory)

    @property
    def is_card(self) -> bool:
        """Raises UsageError for a device that is none."""
        return bool(self.cards)

    @property
    def names_a_device(self) -> bool:
        """Whether anything but the CPU is to compute, or to hold experts."""
        return self.device != "cpu" or self.devices is not None

    def vram_of(self, device: int) -> str | None:
        """`vram` of the device with this number."""
        if self.vram is None or "," not in self.vram:
            return self.vram
        return self.vram.split(",")[device]

    @property
    def moves_experts(self) -> bool:
        """Whether something was asked for that only a mixture has."""
        others = ExpertOptions(device=self.device, gpu_layers=self.gpu_layers, devices=self.devices)
        return self != others or not (self.is_card or self.device == "cpu")


def parse_device(text: str) -> SimulatedSpec | CardSpec | None:
    """None for "cpu". Raises UsageError."""
    kind, _, rest = text.strip().partition(":")
    if kind == "cpu" and not rest:
        return None
    if kind == "cuda" and ":" not in text:
        return CardSpec()
    if kind not in ("cuda", "simulated") or not rest:
        raise UsageError(
            "--device",
            expected=f"cpu, cuda, cuda:1, cuda:8GiB or {EXAMPLE}",
            found=quoted(text, 60),
        )
    if kind == "cuda":
        return _card(rest, "--device", None)
    memory, *settings = rest.split(",")
    given: dict[str, str] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name.strip() not in ("pcie", "latency", "threads") or name.strip() in given:
            raise UsageError(
                "--device", expected="pcie, latency and threads once", found=quoted(setting, 40)
            )
        given[name.strip()] = value.strip()
    return SimulatedSpec(
        parse_size(memory, "--device"),
        _bandwidth(given["pcie"]) if "pcie" in given else DEFAULT_LINK,
        _seconds(given["latency"]) if "latency" in given else DEFAULT_LATENCY,
        _threads(given["threads"]) if "threads" in given else None,
    )


def parse_devices(text: str, memory: int | None) -> tuple[CardSpec, ...]:
    """Of "0,1" or "0:8GiB,1:12GiB": several cards, or one. memory: of each that does not say so
    itself. Raises UsageError."""
    found: list[CardSpec] = []
    for part in text.split(","):
        if not _CARD.match(part.strip()):
            raise UsageError(
                "--devices", expected="cards such as 0,1 or 0:8GiB,1:12GiB", found=quoted(text, 60)
            )
        found.append(_card(part.strip(), "--devices", memory))
    numbers = [spec.number for spec in found]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UsageError("--devices", expected="each card once", found=f"{number} twice")
    return tuple(found)


def _card(text: str, option: str, memory: int | None) -> CardSpec:
    """Of "1", "8GiB" or "1:8GiB": a number of at most two digits is that of a card."""
    match = _CARD.match(text)
    if match is None:
        return CardSpec(memory=parse_size(text, option))
    size = text[match.end() :]
    return CardSpec(int(match[1]), parse_size(size, option) if size else memory)


def _bandwidth(text: str) -> float:
    match = _RATE.fullmatch(text)
    rate = float(parse_size(match[1], "--device: pcie")) if match else 0.0
    if rate <= 0.0:
        raise UsageError("--device: pcie", expected="such as 25GB/s", found=quoted(text, 40))
    return rate


def _seconds(text: str) -> float:
    match = _LATENCY.fullmatch(text)
    if match is None:
        raise UsageError("--device: latency", expected="such as 10us", found=quoted(text, 40))
    return float(match[1]) * _SECONDS[match[2]]


def _threads(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_THREADS):
        raise UsageError(
            "--device: threads", expected=f"1 to {MAX_THREADS}", found=quoted(text, 40)
        )
    return int(text)
