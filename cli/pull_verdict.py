"""What this machine will make of a model before it is downloaded."""

from dataclasses import dataclass

from localr1.checkpoint.hf_directory import MAX_CONFIG_BYTES
from localr1.checkpoint.strict_json import parse_object
from localr1.cli.output import Output, format_bytes
from localr1.cli.plan import Asked
from localr1.cli.plan_machine import Machine, machine_named
from localr1.cli.plan_model import Plan, Subject, known_subjects, make_plan, nearest_that_fits
from localr1.cli.plan_report import one_line, rate, speeds, table_row, verdict
from localr1.experts.hardware import THIS_MACHINE
from localr1.hub.known import find_model
from localr1.hub.pull import Pull
from localr1.hub.selection import CONFIG_NAME
from localr1.qtypes import PORTABLE_BITS
from localr1.quant.recipe import KEEP_BITS
from localr1.settings import Settings

GROUP = 32


@dataclass(frozen=True)
class Verdict:
    """lines: for a person. fits: whether the model will run here in some form; None where that
    cannot be told before it is here. bits: to quantize to, the most that fit; None where none do,
    or the model is quantized already."""

    lines: tuple[str, ...]
    fits: bool | None
    bits: int | None


def judge(pull: Pull, settings: Settings, hardware: str) -> Verdict:
    """From config.json alone. hardware: as of `localr1 plan`. What localr1 cannot run at all is an
    error before the download: raises UnsupportedError, ConfigError and FormatError."""
    if pull.config is None:
        return Verdict(("What it needs can be told once it is here: localr1 plan.",), None, None)
    repository = pull.listing.repository
    config = parse_object(pull.config, f"{repository}: {CONFIG_NAME}", max_bytes=MAX_CONFIG_BYTES)
    subject = Subject(pull.listing.reference.name, config, known=find_model(repository))
    machine = machine_named(hardware, "auto", settings)
    forms = (KEEP_BITS,) if subject.is_packed else (KEEP_BITS, *sorted(PORTABLE_BITS)[::-1])
    plans = [make_plan(subject, machine, _asked(subject, bits)) for bits in forms]
    fitting = [plan for plan in plans if plan.placement.fits]
    if not fitting:
        return Verdict(_lines_of_none(plans[-1], machine), False, None)
    where = "Here" if hardware == THIS_MACHINE else f"On {machine.hardware.name}"
    in_memory = [plan for plan in fitting if not plan.placement.experts_on_disk]
    quantized = [plan.bits for plan in in_memory or fitting if plan.bits is not None]
    lines = tuple(f"{where} {_line(plan, machine)}." for plan in fitting)
    return Verdict(lines, True, quantized[0] if quantized else None)


def print_known(output: Output, settings: Settings, hardware: str, as_json: bool) -> None:
    """The names of models, what they are, and what a machine makes of them at 4 bits."""
    machine = machine_named(hardware, "auto", settings)
    plans = [make_plan(each, machine, _asked(each, None)) for each in known_subjects()]
    if as_json:
        output.json([_row_document(plan, machine) for plan in plans])
        return
    output.table(
        ("NAME", "LICENCE", "HERE, AT 4 BITS", "REPOSITORY"),
        [_row(plan, machine) for plan in plans],
        left=(0, 1, 2, 3),
    )


def _line(plan: Plan, machine: Machine) -> str:
    form = "as it is" if plan.bits is None else f"at {plan.bits} bits"
    decode, _ = speeds(plan, machine)
    return (
        f"{form}, {format_bytes(plan.file_bytes)}: {verdict(plan)}, "
        f"{plan.placement.context:,} tokens of context, about {rate(decode)} tok/s"
    )


def _row(plan: Plan, machine: Machine) -> list[str]:
    known = plan.subject.known
    assert known is not None
    here = verdict(plan)
    if plan.placement.fits:
        here += f", about {rate(speeds(plan, machine)[0])} tok/s"
    return [known.alias, known.licence, here, known.repository or "comes with localr1"]


def _row_document(plan: Plan, machine: Machine) -> dict[str, object]:
    known = plan.subject.known
    assert known is not None
    return {**table_row(plan, machine), "licence": known.licence}


def _asked(subject: Subject, bits: int | None) -> Asked:
    return Asked(None if subject.is_packed else bits, GROUP, None, None, None)


def _lines_of_none(smallest: Plan, machine: Machine) -> tuple[str, ...]:
    nearest = nearest_that_fits(smallest, machine, smallest.asked)
    fits = "nothing that is known here" if nearest is None else one_line(nearest, machine)
    machine_name = "this machine" if not machine.option else machine.hardware.name
    return (f"It will not fit {machine_name}.", f"Nearest: {fits}.")
