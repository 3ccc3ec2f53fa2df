"""From what a user calls a model to its placement on a machine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localr1.checkpoint.hf_directory import CONFIG_NAME, MAX_CONFIG_BYTES
from localr1.checkpoint.nf4 import runnable
from localr1.checkpoint.strict_json import read_object
from localr1.cli.models import resolve_model
from localr1.cli.output import format_bytes
from localr1.cli.parameters import suggestion
from localr1.cli.plan import Asked
from localr1.cli.plan_cards import with_cards, with_mixture_on_cards
from localr1.cli.plan_machine import Machine
from localr1.cli.show import open_headers
from localr1.embedded import R1_NANO
from localr1.errors import NotFoundError, UsageError
from localr1.experts.budget import parse_budget
from localr1.experts.footprint import Footprint, measure
from localr1.experts.placement import LEAST_CONTEXT, Budgets, Placement, place
from localr1.experts.workspace import cache_in_8_bits
from localr1.hub.known import KnownModel, find_model, known_models, smaller_models
from localr1.models.registry import parse_config
from localr1.qtypes import PORTABLE_BITS
from localr1.quant.forecast import (
    Forecast,
    forecast_of_plan,
    forecast_quantized,
    forecast_released,
    is_packed,
)
from localr1.quant.plan import plan_quantization
from localr1.quant.recipe import KEEP_BITS, Recipe
from localr1.settings import Settings

DEFAULT_BITS = 4


@dataclass(frozen=True)
class Subject:
    """name: as the user calls it. config: of config.json. path: where its weights are, None where
    only the config is known. known: of the table, if it is there."""

    name: str
    config: Mapping[str, Any]
    path: Path | None = None
    known: KnownModel | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it is quantized already."""
        return is_packed(self.config)


@dataclass(frozen=True)
class Plan:
    """bits: None where the model runs as it is. file_bytes: of its tensors on disk, as they will
    be. asked: the options it was made with. no_gpu: why the plan does without the GPU that there
    is, "" where it does not. vram_short: bytes that the GPU lacks for a mixture."""

    subject: Subject
    bits: int | None
    group: int
    file_bytes: int
    placement: Placement
    asked: Asked
    no_gpu: str = ""
    vram_short: int = 0


def find_subject(name: str, settings: Settings) -> Subject:
    """What `name` means: a path, a model of this user's library, or one known by name. Raises
    NotFoundError, with a suggestion, and what reading its config raises."""
    path = Path(name)
    known = find_model(name)
    if path.is_file() and path.suffix == ".json":
        return Subject(str(path), read_object(path, str(path), max_bytes=MAX_CONFIG_BYTES))
    try:
        path = resolve_model(name, settings)
    except NotFoundError:
        if known is None:
            names = [*known_models(), *(m.repository for m in known_models().values())]
            raise NotFoundError(
                f"{name}: there is no such file or directory, nor is it a known model",
                fix=suggestion(name, [each for each in names if each]),
            ) from None
        return Subject(known.alias, known.config, known=known)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / CONFIG_NAME).is_file():
        shown = path / CONFIG_NAME
        return Subject(name, read_object(shown, str(shown), max_bytes=MAX_CONFIG_BYTES))
    with open_headers(path) as checkpoint:
        return Subject(name, checkpoint.config, path, known if path == R1_NANO else None)


def known_subjects() -> Iterator[Subject]:
    for model in known_models().values():
        path = R1_NANO if model.alias == R1_NANO.name else None
        yield Subject(model.alias, model.config, path, model)


def make_plan(subject: Subject, machine: Machine, asked: Asked) -> Plan:
    """Raises UsageError for options that cannot be meant, and what the config or the recipe
    raises."""
    bits = _bits(subject, asked)
    forecast = _forecast(subject, bits, asked.group)

    def footprint_of(*, for_card: bool) -> Footprint:
        found = measure(forecast.tensors, forecast.config, for_card=for_card)
        return found.with_cache_in_8_bits() if cache_in_8_bits(asked.kv_bits) else found

    footprint = footprint_of(for_card=machine.memory.vram is not None)
    _check_context(asked.context, footprint.config.max_positions)
    if footprint.num_experts:
        _check_no_layers(asked)
        if asked.devices is not None and machine.cards:
            return _mixture_on_cards(subject, machine, asked, bits, forecast, footprint)
    elif machine.memory.vram is not None:
        return _dense_plan(subject, machine, asked, bits, forecast, footprint)
    elif asked.gpu_layers is not None:
        raise _no_gpu("--gpu-layers", str(asked.gpu_layers))
    whole = place(footprint, machine.memory, asked.context, threads=machine.threads)
    budgets = _budgets(asked, whole)
    placement = place(
        footprint, machine.memory, asked.context, budgets=budgets, threads=machine.threads
    )
    made = Plan(subject, bits, asked.group, forecast.nbytes, placement, asked)
    if placement.fits or machine.memory.vram is None or asked.vram is not None:
        return made
    without = place(
        footprint_of(for_card=False),
        replace(machine.memory, vram=None),
        asked.context,
        budgets=budgets,
        threads=machine.threads,
    )
    if sum(without.short.values()) >= sum(placement.short.values()):
        return made
    short = placement.short.get("vram", 0)
    no_gpu = f"which lacks {format_bytes(short)}" if short else ""
    return replace(made, placement=without, no_gpu=no_gpu, vram_short=short)


def _dense_plan(
    subject: Subject,
    machine: Machine,
    asked: Asked,
    bits: int | None,
    forecast: Forecast,
    footprint: Footprint,
) -> Plan:
    """On a machine with cards: all lies in main memory, layers on cards too."""
    for option, value in (("--vram", asked.vram), ("--ram", asked.ram)):
        if value is not None:
            raise UsageError(
                option,
                expected="a mixture, whose experts can be moved",
                found=f"{subject.name}, which has none",
                fix="Leave it out; --gpu-layers says how many layers go to the GPU.",
            )
    memory = replace(machine.memory, vram=None)
    placement = place(footprint, memory, asked.context, threads=machine.threads)
    no_gpu = ""
    if placement.fits:
        placement, no_gpu = with_cards(placement, forecast, machine, asked)
    return Plan(subject, bits, asked.group, forecast.nbytes, placement, asked, no_gpu)


def _mixture_on_cards(
    subject: Subject,
    machine: Machine,
    asked: Asked,
    bits: int | None,
    forecast: Forecast,
    footprint: Footprint,
) -> Plan:
    """On cards that were named: all but experts lies in main memory, and on the cards too."""
    memory = replace(machine.memory, vram=None)
    whole = place(footprint, memory, asked.context, threads=machine.threads)
    budgets = _budgets(replace(asked, vram=None), whole)
    placement = place(footprint, memory, asked.context, budgets=budgets, threads=machine.threads)
    no_gpu = ""
    if placement.fits:
        placement, no_gpu = with_mixture_on_cards(placement, forecast, machine, asked)
    return Plan(subject, bits, asked.group, forecast.nbytes, placement, asked, no_gpu)


def _check_no_layers(asked: Asked) -> None:
    if asked.gpu_layers is not None:
        raise UsageError(
            "--gpu-layers",
            expected="a dense model: of a mixture, plans know cards with all but experts",
            found=asked.gpu_layers,
        )


def nearest_that_fits(plan: Plan, machine: Machine, asked: Asked) -> Plan | None:
    """The first that fits of: a shorter context, fewer bits, a smaller model of the family; first
    of those that use the GPU where there is one. None where nothing of these does."""
    asked = replace(asked, vram=None, ram=None, gpu_layers=None)
    bits = [each for each in PORTABLE_BITS[::-1] if plan.bits is not None and each < plan.bits]
    candidates = [(plan.subject, replace(asked, bits=each)) for each in bits]
    if plan.placement.largest_context >= LEAST_CONTEXT:
        shorter = replace(asked, context=plan.placement.largest_context)
        candidates.insert(0, (plan.subject, shorter))
    if plan.subject.known is not None:
        for model in smaller_models(plan.subject.known):
            smaller = Subject(model.alias, model.config, known=model)
            candidates += [
                (smaller, replace(asked, bits=each, context=_within(asked.context, model)))
                for each in PORTABLE_BITS[::-1]
            ]
    without_gpu = None
    for subject, options in candidates:
        made = make_plan(subject, machine, options)
        if made.placement.fits and not made.placement.experts_on_disk:
            if not made.no_gpu:
                return made
            without_gpu = without_gpu or made
    return without_gpu


def _within(context: int | None, model: KnownModel) -> int | None:
    return None if context is None else min(context, parse_config(model.config).max_positions)


def _bits(subject: Subject, asked: Asked) -> int | None:
    """None: as it is."""
    if subject.is_packed:
        if asked.bits is not None:
            raise UsageError(
                "--bits",
                expected="none: the model is quantized already",
                found=asked.bits,
                fix="Plan the original model to choose its bits.",
            )
        return None
    if asked.bits == KEEP_BITS:
        return None
    return DEFAULT_BITS if asked.bits is None else asked.bits


def _forecast(subject: Subject, bits: int | None, group: int) -> Forecast:
    recipe = None if bits is None else Recipe.uniform(bits, group)
    if subject.path is None:
        if recipe is None:
            return forecast_released(subject.config)
        return forecast_quantized(subject.config, recipe)
    with open_headers(subject.path) as checkpoint:
        config = parse_config(checkpoint.config)
        if recipe is not None:
            return forecast_of_plan(plan_quantization(checkpoint, recipe), config)
        return Forecast(config, tuple((info, 1) for info in runnable(checkpoint).tensors.values()))


def _check_context(context: int | None, longest: int) -> None:
    if context is not None and not 2 <= context <= longest:
        raise UsageError(
            "--context",
            expected=f"2 to {longest:,} tokens, what the model was made for",
            found=f"{context:,}",
        )


def _no_gpu(option: str, found: str) -> UsageError:
    return UsageError(
        option,
        expected="a machine with a GPU",
        found=found[:40],
        fix="Name one with --hardware.",
    )


def _budgets(asked: Asked, whole: Placement) -> Budgets:
    """whole: the placement without them, which says how much there is for experts."""
    experts = whole.footprint.experts
    if asked.vram is not None and whole.vram is None:
        raise _no_gpu("--vram", asked.vram)
    ram = vram = None
    if asked.ram is not None:
        ram = parse_budget(asked.ram, "--ram", whole=experts, available=whole.ram.experts)
    if asked.vram is not None and whole.vram is not None:
        vram = parse_budget(asked.vram, "--vram", whole=experts, available=whole.vram.experts)
    return Budgets(ram=ram, vram=vram)
