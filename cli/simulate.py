"""`localr1 simulate`: what a machine would make of a routing trace."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.models import EMBEDDED_BITS, resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.embedded import R1_NANO
from localr1.errors import MemoryLimitError, NotFoundError, UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.experts.hardware import HardwareProfile
    from localr1.experts.simulate import Budgets, MixtureSizes, Prediction
    from localr1.experts.trace import Trace
    from localr1.models.config import ModelConfig

VRAM_MARGIN = 1 << 30
"""Of a GPU's memory, for the cache of keys and values, the workspace and the driver."""
RAM_MARGIN = 4 << 30
"""Of main memory, for the system and all other programs."""
GROUP = 32
"""Weights that share a scale, where --bits is one of localr1's own formats."""


def model_config(name: str | None, trace: "Trace", settings: Settings) -> "ModelConfig":
    """Of a model's directory, .gguf file, config.json or name; None: of the model that the trace
    names. Raises NotFoundError, UsageError and what a config raises."""
    from localr1.checkpoint.strict_json import read_object
    from localr1.models.registry import parse_config

    if name is not None and name.endswith(".json"):
        return parse_config(read_object(Path(name), name))
    from localr1.cli.show import open_headers

    with open_headers(_model_path(name, trace, settings)) as checkpoint:
        return parse_config(checkpoint.config)


def _model_path(name: str | None, trace: "Trace", settings: Settings) -> Path:
    if name is not None:
        return resolve_model(name, settings)
    if trace.model == f"{R1_NANO.name}-int{EMBEDDED_BITS}":
        return R1_NANO
    # A path in a trace's metadata is a stranger's.
    if trace.model != Path(trace.model).name:
        raise _unknown_model(trace)
    try:
        return resolve_model(trace.model, settings)
    except NotFoundError:
        raise _unknown_model(trace) from None


def _unknown_model(trace: "Trace") -> UsageError:
    return UsageError(
        f"the trace is of {trace.model[:100]!r}, which is no model here",
        fix="Give its directory, .gguf file or config.json by --model.",
    )


def check_shape(trace: "Trace", config: "ModelConfig") -> None:
    """Raises UsageError where the trace cannot be of this model."""
    assert config.moe is not None
    router = config.moe.router
    expected = len(config.moe.layers), router.num_experts, router.experts_per_token
    found = len(trace.layers), trace.num_experts, trace.experts_per_token
    if expected != found:
        raise UsageError(
            "the trace and the model",
            expected="{} layers of {} experts, {} a token".format(*expected),
            found="{}, {} and {}".format(*found),
            fix="Give the model that the trace was recorded of by --model.",
        )


def bits_per_weight(bits: float) -> float:
    """4 and 8 with their scales; any other number is taken as it is."""
    from localr1.qtypes import CARD_BITS, QuantScheme

    return QuantScheme(int(bits), GROUP).bits_per_weight if bits in CARD_BITS else bits


def choose_budgets(
    vram: str | None,
    ram: str | None,
    sizes: "MixtureSizes",
    all_experts: int,
    hardware: "HardwareProfile",
) -> "Budgets":
    """By default what the machine has, less all other weights and a margin. Raises UsageError for
    what is no amount, or more than that, and MemoryLimitError where the other weights are too much.
    """
    from localr1.experts.budget import parse_budget
    from localr1.experts.simulate import Budgets

    free_vram = free_ram = 0
    if hardware.has_gpu:
        free_vram = hardware.vram_bytes - VRAM_MARGIN - sizes.dense_bytes
        free_ram = hardware.ram_bytes - RAM_MARGIN
    else:
        free_ram = hardware.ram_bytes - RAM_MARGIN - sizes.dense_bytes
    if free_vram < 0 or free_ram < 0:
        margin = VRAM_MARGIN if hardware.has_gpu else RAM_MARGIN
        raise MemoryLimitError(
            f"{hardware.name}: memory for the weights of every token",
            expected=f"{format_bytes(sizes.dense_bytes + margin)}",
            found=format_bytes(hardware.vram_bytes if hardware.has_gpu else hardware.ram_bytes),
            fix="Choose fewer bits or another machine.",
        )

    def chosen(text: str | None, option: str, free: int) -> int:
        if text is None:
            return min(free, all_experts)
        return parse_budget(text, option, whole=all_experts, available=free)

    return Budgets(chosen(vram, "--vram", free_vram), chosen(ram, "--ram", free_ram))


def as_row(found: "Prediction") -> dict[str, Any]:
    uses, tokens = found.uses, found.tokens
    return {
        **asdict(found),
        "device_share": found.device_uses / uses,
        "ram_share": found.ram_uses / uses,
        "disk_share": found.reads / uses,
        "bytes_per_token": {
            "device": found.device_bytes / tokens,
            "ram": found.ram_bytes / tokens,
            "link": found.link_bytes / tokens,
            "disk": found.disk_bytes / tokens,
        },
        "tokens_per_second": found.tokens_per_second,
        "bound": found.bound,
    }


def print_table(output: Output, rows: Sequence[dict[str, Any]], head: dict[str, str]) -> None:
    output.fields(head)
    output.line()
    output.table(
        ("policy", "device", "RAM", "disk", "link/token", "disk/token", "tok/s", "bound by"),
        [
            (
                row["policy"],
                f"{row['device_share']:.1%}",
                f"{row['ram_share']:.1%}",
                f"{row['disk_share']:.1%}",
                format_bytes(round(row["bytes_per_token"]["link"])),
                format_bytes(round(row["bytes_per_token"]["disk"])),
                f"{row['tokens_per_second']:.2f}",
                row["bound"],
            )
            for row in rows
        ],
    )


def simulate(
    trace: Annotated[Path, typer.Argument(help="As `localr1 trace --out` writes it.")],
    hardware: Annotated[
        str,
        typer.Option(help='A profile, a .toml or .json file of one, or "this" machine, measured.'),
    ] = "this",
    bits: Annotated[float, typer.Option(min=1.0, max=32.0, help="Of a weight.")] = 4,
    model: Annotated[
        str | None,
        typer.Option(help="Its directory, .gguf file, config.json or name; as the trace says."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="For experts: bytes, 8GiB, or 50% of all; what is free.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="For experts: bytes, 24GiB, or 50% of all; what is free.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Any of static, lru, lfu, adaptive, belady, with commas between.")
    ] = "static,lru,lfu,adaptive,belady",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine anew, a second.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Predict hit rates, bytes moved and tokens a second from a routing trace."""
    from localr1.experts import simulate as simulation
    from localr1.experts.hardware import THIS_MACHINE, named_profile
    from localr1.experts.trace import read_trace

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    policies = [simulation.check_policy(name.strip()) for name in policy.split(",")]
    if hardware == THIS_MACHINE:
        from localr1.experts.measure import this_machine

        profile = this_machine(settings.cache_dir, threads=settings.threads, anew=measure)
    else:
        profile = named_profile(hardware)
    recorded = read_trace(trace)
    config = model_config(model, recorded, settings)
    sizes = simulation.mixture_sizes(config, bits_per_weight(bits))
    check_shape(recorded, config)
    all_experts = sizes.expert_bytes * len(recorded.layers) * recorded.num_experts
    budgets = choose_budgets(vram, ram, sizes, all_experts, profile)
    found = []
    with output.progress("simulate") as line:
        for index, name in enumerate(policies):
            line.update(index, len(policies), name)
            found.append(simulation.simulate(recorded, sizes, profile, budgets, name))
    rows = [as_row(each) for each in found]
    if as_json:
        output.json(
            {
                "model": recorded.model,
                "hardware": asdict(profile),
                "bits_per_weight": bits_per_weight(bits),
                "expert_bytes": sizes.expert_bytes,
                "experts_bytes": all_experts,
                "dense_bytes": sizes.dense_bytes,
                "budgets": asdict(budgets),
                "policies": rows,
            }
        )
        return
    head = {
        "model": f"{recorded.model}, {bits_per_weight(bits):g} bits a weight",
        "experts": f"{format_bytes(all_experts)}, {format_bytes(sizes.expert_bytes)} each",
        "other weights": f"{format_bytes(sizes.dense_bytes)} a token",
        "hardware": profile.name,
        "for experts": f"{_share(budgets.vram, all_experts)} on the device, "
        f"{_share(budgets.ram, all_experts)} in RAM",
        "decoded": f"{found[0].tokens:,} tokens",
    }
    print_table(output, rows, head)


def _share(nbytes: int, whole: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes / whole:.0%})"
