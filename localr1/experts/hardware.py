"""What a machine can do, in the numbers that the speed of a mixture of experts follows from. Pure:
no torch. measure.py finds them out for this machine."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, UsageError
from localr1.experts.budget import parse_size

LARGE_EXPERT: Final = 8 << 20
"""Bytes from which on a GPU reads an expert at its bandwidth for large ones."""
MAX_FILE: Final = 1 << 16


@dataclass(frozen=True)
class CardProfile:
    """As of a HardwareProfile: bytes of a card, GB/s of its weights, 10^9 multiply-adds a second; 0
    where not known."""

    vram_bytes: int
    dense: float
    gmacs: float = 0.0


@dataclass(frozen=True)
class HardwareProfile:
    """Bandwidths are effective ones, in GB/s (10^9 bytes): what a kernel or a copy reaches, not
    what is printed on the box.

    vram_bytes: 0 where there is no GPU; its bandwidths and the latency are 0 then too.
    gpu_large, gpu_small: of experts that the GPU computes, of LARGE_EXPERT bytes and below. pcie: a
    copy from RAM. cpu: of experts that the CPU computes. dense: of all other weights, wherever they
    are computed: on the GPU where there is one. disk: direct reads of experts. round_trip_us: what
    a layer takes that the GPU and the CPU share, beyond their work. cpu_gmacs, gpu_gmacs: 10^9
    multiply-adds a second of a prompt's products with packed weights; 0 where not known.
    more_cards: GPUs beside the first.
    """

    name: str
    vram_bytes: int
    ram_bytes: int
    gpu_large: float
    gpu_small: float
    pcie: float
    cpu: float
    dense: float
    disk: float
    round_trip_us: float
    cpu_gmacs: float = 0.0
    gpu_gmacs: float = 0.0
    more_cards: tuple[CardProfile, ...] = ()

    @property
    def cards(self) -> tuple[CardProfile, ...]:
        """By their numbers, the first GPU as card 0."""
        if not self.has_gpu:
            return ()
        return (CardProfile(self.vram_bytes, self.dense, self.gpu_gmacs), *self.more_cards)

    @property
    def has_gpu(self) -> bool:
        return self.vram_bytes > 0

    def gpu(self, expert_bytes: int) -> float:
        """GB/s at which the GPU reads experts of this size."""
        return self.gpu_large if expert_bytes >= LARGE_EXPERT else self.gpu_small


GIB: Final = 1 << 30
PROFILES: Final = {
    # Effective bandwidths as published for llama.cpp-like kernels on these cards; PCIe 4 x16 (5 for
    # the 5090), dual-channel memory of the usual speed, one NVMe drive. Multiply-adds of the 4090:
    # llama.cpp's 10,359 tok/s of an 8B Q4_0 prompt (its pull request 7676); of the other cards by
    # their int8 tensor throughput; of CPUs 8 cores at 50 (DDR4) and 100 GMAC/s, which is what
    # benchmarks/README.md has of a core with AVX2 and less than it has with AVX-512-VNNI.
    "rtx3060-12g-ddr4-32g": HardwareProfile(
        name="RTX 3060 12 GB, 32 GB DDR4",
        vram_bytes=12 * GIB,
        ram_bytes=32 * GIB,
        gpu_large=250,
        gpu_small=216,
        pcie=24,
        cpu=38,
        dense=250,
        disk=6.5,
        round_trip_us=85,
        cpu_gmacs=400,
        gpu_gmacs=9_400,
    ),
    "rtx4090-24g-ddr5-64g": HardwareProfile(
        name="RTX 4090 24 GB, 64 GB DDR5",
        vram_bytes=24 * GIB,
        ram_bytes=64 * GIB,
        gpu_large=700,
        gpu_small=450,
        pcie=25,
        cpu=60,
        dense=700,
        disk=6.5,
        round_trip_us=85,
        cpu_gmacs=800,
        gpu_gmacs=78_000,
    ),
    "rtx5090-32g-ddr5-192g": HardwareProfile(
        name="RTX 5090 32 GB, 192 GB DDR5",
        vram_bytes=32 * GIB,
        ram_bytes=192 * GIB,
        gpu_large=1250,
        gpu_small=590,
        pcie=50,
        cpu=60,
        dense=1250,
        disk=12,
        round_trip_us=85,
        cpu_gmacs=800,
        gpu_gmacs=99_000,
    ),
    "cpu-ddr5-64g": HardwareProfile(
        name="no GPU, 64 GB DDR5",
        vram_bytes=0,
        ram_bytes=64 * GIB,
        gpu_large=0,
        gpu_small=0,
        pcie=0,
        cpu=60,
        dense=60,
        disk=6.5,
        round_trip_us=0,
        cpu_gmacs=800,
        gpu_gmacs=0,
    ),
}
"""By the name that `--hardware` takes."""
THIS_MACHINE: Final = "this"


def named_profile(name: str) -> HardwareProfile:
    """One of PROFILES, or of a .toml or .json file. Raises UsageError, NotFoundError and
    FormatError."""
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if path.suffix in (".toml", ".json"):
        return read_profile(path)
    raise UsageError(
        "--hardware",
        expected=f"one of {', '.join([*PROFILES, THIS_MACHINE])}, or a .toml or .json file",
        found=quoted(name),
    )


def read_profile(path: Path) -> HardwareProfile:
    """A profile of one's own: a file with the fields of HardwareProfile, of which those that a
    machine without a GPU has none of may be left out there; sizes also as text such as "24GiB".
    more_cards is a list of tables with the fields of CardProfile. Raises NotFoundError and
    FormatError."""
    # Reading untrusted files is the checkpoint's trade, which imports torch.
    from localr1.checkpoint.files import decode_utf8, read_bounded
    from localr1.checkpoint.strict_json import parse_object

    shown = str(path)
    data = read_bounded(path, shown, MAX_FILE)
    if path.suffix == ".json":
        return profile_of(parse_object(data, shown), shown)
    try:
        values = tomllib.loads(decode_utf8(data, shown))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{shown}: is not valid TOML", found=str(error)) from error
    return profile_of(values, shown)


def profile_of(values: Mapping[str, Any], shown: str) -> HardwareProfile:
    """A profile of its fields as a file has them. Raises FormatError."""
    names = [field.name for field in fields(HardwareProfile)]
    for name in values:
        if name not in names:
            raise FormatError(
                f"{shown}: {quoted(name)}", expected=f"fields among {', '.join(names)}"
            )
    name = values.get("name", shown)
    if not isinstance(name, str) or len(name) > 200:
        raise FormatError(f"{shown}: name", expected="a text", found=quoted(name))
    more_cards = _more_cards(values.get("more_cards", []), f"{shown}: more_cards")
    sizes = {each: _size(values.get(each, 0), f"{shown}: {each}") for each in SIZES}
    given = {**NOT_KNOWN, **(NO_GPU if sizes["vram_bytes"] == 0 else {}), **values}
    numbers: dict[str, float] = {}
    for each, (least, most) in NUMBERS.items():
        if each not in given:
            raise FormatError(f"{shown}: {each} is missing", expected="a number")
        may_be_none = each in NO_GPU and sizes["vram_bytes"] == 0
        numbers[each] = _number(
            given[each], 0.0 if may_be_none else least, most, f"{shown}: {each}"
        )
    if sizes["ram_bytes"] == 0:
        raise FormatError(f"{shown}: ram_bytes", expected="more than 0", found="0")
    if more_cards and sizes["vram_bytes"] == 0:
        raise FormatError(
            f"{shown}: more_cards", expected="a first GPU, in vram_bytes", found="none"
        )
    return HardwareProfile(
        name, sizes["vram_bytes"], sizes["ram_bytes"], **numbers, more_cards=more_cards
    )


SIZES: Final = ("vram_bytes", "ram_bytes")
_BANDWIDTH: Final = (1e-3, 1e6)
NUMBERS: Final = {
    "gpu_large": _BANDWIDTH,
    "gpu_small": _BANDWIDTH,
    "pcie": _BANDWIDTH,
    "cpu": _BANDWIDTH,
    "dense": _BANDWIDTH,
    "disk": _BANDWIDTH,
    "round_trip_us": (0.0, 1e6),
    "cpu_gmacs": (0.0, 1e9),
    "gpu_gmacs": (0.0, 1e9),
}
"""Least and most that a file may give."""
NO_GPU: Final = {"gpu_large": 0.0, "gpu_small": 0.0, "pcie": 0.0, "round_trip_us": 0.0}
NOT_KNOWN: Final = {"cpu_gmacs": 0.0, "gpu_gmacs": 0.0}
CARD_FIELDS: Final = {"vram_bytes", "dense", "gmacs"}
MAX_BYTES: Final = 1 << 60


def _more_cards(values: object, shown: str) -> tuple[CardProfile, ...]:
    tables = values if isinstance(values, list) else [values]
    found = []
    for table in tables:
        if not isinstance(table, dict) or not {"vram_bytes", "dense"} <= set(table) <= CARD_FIELDS:
            raise FormatError(
                shown, expected="tables with vram_bytes, dense and gmacs", found=quoted(values, 60)
            )
        nbytes = _size(table["vram_bytes"], f"{shown}: vram_bytes")
        dense = _number(table["dense"], *_BANDWIDTH, f"{shown}: dense")
        gmacs = _number(table.get("gmacs", 0.0), *NUMBERS["gpu_gmacs"], f"{shown}: gmacs")
        found.append(CardProfile(nbytes, dense, gmacs))
    return tuple(found)


def _size(value: object, shown: str) -> int:
    if isinstance(value, str):
        try:
            value = parse_size(value, shown)
        except UsageError as error:
            raise FormatError(error.what, expected=error.expected, found=error.found) from error
    if type(value) is not int or not 0 <= value <= MAX_BYTES:
        raise FormatError(shown, expected='bytes, or a text such as "24GiB"', found=quoted(value))
    return value


def _number(value: object, least: float, most: float, shown: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise FormatError(
            shown, expected=f"a number from {least:g} to {most:g}", found=quoted(value)
        )
    return float(value)
