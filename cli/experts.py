"""Where the experts of a mixture lie: the options that commands share, and what is shown of it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.output import format_bytes

if TYPE_CHECKING:
    from localr1.experts.options import ExpertOptions
    from localr1.experts.store import ExpertStore
    from localr1.experts.usage import ExpertUsage

SHADES = " .:-=+*#%@"
"""From never chosen to chosen the most."""
NUMBER_COLUMNS = 5
"""Of a layer's number, before its cells."""

RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        help="RAM for experts: 24GiB, or 50% of them; default: what is free.",
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Of the device's memory; as --ram. Of several cards each: 8GiB, or 8GiB,12GiB.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="What computes besides the CPU: cpu for nothing; cuda, cuda:1 or cuda:8GiB, an NVIDIA "
        "card, which takes layers and a mixture's hot experts; or simulated:24GiB, which shows "
        "where experts would lie.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="CARDS",
        help="Several NVIDIA cards, each with a part of the layers: 0,1 or 0:8GiB,1:12GiB.",
    ),
]
GpuLayersOption = Annotated[
    int | None,
    typer.Option(
        "--gpu-layers",
        metavar="N",
        help="Layers on cards, routed experts aside; default: as many as they have room for.",
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option("--policy", help="Which experts are kept: adaptive, lru, lfu or static."),
]
ReadAheadOption = Annotated[
    bool | None,
    typer.Option(
        "--read-ahead/--no-read-ahead",
        help="Guess what the next layer needs from disk; default: while it pays.",
    ),
]


def expert_options(
    ram: str | None = None,
    vram: str | None = None,
    device: str = "cpu",
    policy: str = "adaptive",
    read_ahead: bool | None = None,
    gpu_layers: int | None = None,
    devices: str | None = None,
) -> "ExpertOptions":
    """Raises UsageError."""
    from localr1.experts.options import ExpertOptions

    return ExpertOptions(ram, vram, device, policy, read_ahead, gpu_layers, devices)


def usage_line(usage: "ExpertUsage") -> str:
    """ "experts: hit 83% · device 1.2 GiB · RAM 3.4 GiB · disk 120 MiB · 12 promoted · bound by
    RAM"."""
    parts = [f"hit {usage.hit_rate:.0%}"]
    for name, nbytes in (
        ("device", usage.device_bytes),
        ("RAM", usage.ram_bytes),
        ("link", usage.link_bytes),
        ("disk", usage.disk_bytes),
    ):
        if nbytes:
            parts.append(f"{name} {format_bytes(nbytes)}")
    if usage.promotions:
        parts.append(f"{usage.promotions} promoted")
    if usage.demotions:
        parts.append(f"{usage.demotions} moved back")
    if usage.prefetched:
        parts.append(f"{usage.prefetch_hits} of {usage.prefetched} read ahead used")
    return f"experts: {' · '.join(parts)} · bound by {usage.bound}"


def usage_document(usage: "ExpertUsage") -> dict[str, Any]:
    """The same for programs."""
    return {
        "hit_rate": round(usage.hit_rate, 4),
        "device_hits": usage.device_hits,
        "ram_hits": usage.ram_hits,
        "disk_reads": usage.reads,
        "device_bytes": usage.device_bytes,
        "ram_bytes": usage.ram_bytes,
        "link_bytes": usage.link_bytes,
        "disk_bytes": usage.disk_bytes,
        "promotions": usage.promotions,
        "demotions": usage.demotions,
        "read_ahead": usage.prefetched,
        "read_ahead_used": usage.prefetch_hits,
        "bound": usage.bound,
    }


def heat_map(store: "ExpertStore", columns: int) -> list[str]:
    """How often each expert was chosen, a line a layer, darker for more; several experts share a
    character where the terminal is narrow. Below it what lies where."""
    layers, num_experts = store.counts.shape
    per_cell = -(-num_experts // max(columns - NUMBER_COLUMNS, 1))
    width = -(-num_experts // per_cell)
    lines = []
    for layer, counts in zip(store.layer_numbers, store.counts.tolist(), strict=True):
        cells = [sum(counts[i : i + per_cell]) for i in range(0, num_experts, per_cell)]
        most = max(cells)
        text = "".join(
            SHADES[0 if not cell else 1 + (len(SHADES) - 2) * cell // most] for cell in cells
        )
        lines.append(f"{layer:>4} {text}")
    held, there = store.num_in_ram, store.num_on_device
    total = layers * num_experts
    where = (
        [f"{there} on {'devices' if len(store.devices) > 1 else 'the device'}"]
        if store.devices
        else []
    )
    where += [f"{held} in RAM", f"{total} in all"]
    shown = f"{width} columns of {per_cell} experts" if per_cell > 1 else f"{num_experts} experts"
    lines.append(f"{layers} layers, {shown} each; {', '.join(where)}")
    return lines
