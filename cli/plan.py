"""`localr1 plan`: what fits where, and how fast it will be, before anything is downloaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.chat_options import KvBitsOption
from localr1.cli.experts import DevicesOption, GpuLayersOption
from localr1.cli.output import Output
from localr1.errors import MemoryLimitError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.cli.plan_machine import Machine
    from localr1.cli.plan_model import Subject

DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class Asked:
    """The options as they were given."""

    bits: int | None
    group: int
    context: int | None
    vram: str | None
    ram: str | None
    kv_bits: int | None = None
    gpu_layers: int | None = None
    devices: str | None = None


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model's directory, .gguf file, config.json, or a name such as r1; none: a "
            "table of the known models."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", "-b", help="As of `quantize`: 4 (default), 5, 6 or 8; 16: as it is."
        ),
    ] = None,
    group: Annotated[
        int, typer.Option("--group", "-g", help="Weights that share a scale: 32, 64 or 128.")
    ] = 32,
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Tokens of the window.")
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", help="Graphics memory for experts: 8GiB, or 50% of them."),
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", help="Main memory for experts: 24GiB, or 50% of them.")
    ] = None,
    kv_bits: KvBitsOption = None,
    hardware: Annotated[
        str,
        typer.Option("--hardware", help="A machine by name, or a .toml or .json file of one."),
    ] = "this",
    device: Annotated[
        str, typer.Option("--device", help="auto, or cpu: as if there were no GPU.")
    ] = "auto",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What of a model lies where, the longest context, and the speed to expect. Exits with 3 where
    it does not fit, and names the nearest that does."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    from localr1.cli.plan_machine import machine_named

    asked = Asked(bits, group, context, vram, ram, kv_bits, gpu_layers, devices)
    machine = machine_named(hardware, device, settings, devices)
    if model is None:
        print_table(output, machine, asked, as_json)
        return
    from localr1.cli.plan_model import find_subject

    print_model(output, find_subject(model, settings), machine, asked, as_json)


def print_model(
    output: Output, subject: "Subject", machine: "Machine", asked: Asked, as_json: bool
) -> None:
    """Raises typer.Exit with code 3 where the model does not fit."""
    from localr1.cli.plan_model import make_plan, nearest_that_fits
    from localr1.cli.plan_report import as_document, print_plan

    made = make_plan(subject, machine, asked)
    nearest = None if made.placement.fits else nearest_that_fits(made, machine, asked)
    if as_json:
        output.json(as_document(made, nearest, machine))
    else:
        print_plan(output, made, nearest, machine)
    if not made.placement.fits:
        raise typer.Exit(MemoryLimitError.exit_code)


def print_table(output: Output, machine: "Machine", asked: Asked, as_json: bool) -> None:
    from localr1.cli.plan_model import known_subjects, make_plan
    from localr1.cli.plan_report import print_plans, table_row

    plans = [
        make_plan(subject, machine, each)
        for subject in known_subjects()
        for each in ([asked] if asked.bits else both_bits(asked))
    ]
    if as_json:
        output.json([table_row(made, machine) for made in plans])
    else:
        print_plans(output, plans, machine)


def both_bits(asked: Asked) -> list[Asked]:
    from dataclasses import replace

    return [replace(asked, bits=4), replace(asked, bits=8)]
