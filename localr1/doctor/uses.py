"""What of this machine localr1 uses, what it does not, and why."""

from dataclasses import dataclass
from typing import Final

from localr1.doctor.cards import (
    Obstacle,
    age_obstacle,
    card_obstacle,
    driver_obstacle,
    hidden_obstacle,
)
from localr1.doctor.finding import Use
from localr1.doctor.kernel_cache import KernelCacheFacts
from localr1.doctor.memory import MemoryFacts
from localr1.doctor.network import NetworkFacts
from localr1.doctor.nvidia import Card, NvidiaFacts
from localr1.doctor.processor import ProcessorFacts
from localr1.doctor.sizes import gib
from localr1.doctor.software import TorchFacts
from localr1.doctor.storage import Place

NOT_YET: Final = Obstacle(
    "this version of localr1 does not compute on graphics cards yet",
    "nothing needs to be done, for the CPU computes everything",
)


@dataclass(frozen=True)
class Machine:
    """All that uses follow from. computes_on_cards: whether this localr1 can at all. visible:
    CUDA_VISIBLE_DEVICES. memory_budget: bytes that a model may take now."""

    processor: ProcessorFacts
    memory: MemoryFacts
    memory_budget: int
    nvidia: NvidiaFacts
    torch: TorchFacts
    kernel_cache: KernelCacheFacts
    computes_on_cards: bool
    visible: str | None
    places: tuple[Place, ...]
    network: NetworkFacts


def computes_on_cards() -> bool:
    """Whether `--device` takes a card: asked of the option itself, so that it cannot be wrong."""
    from localr1.errors import UsageError
    from localr1.experts.options import parse_device

    try:
        parse_device("cuda")
    except UsageError:
        return False
    return True


def uses_of(machine: Machine) -> tuple[Use, ...]:
    """Of a machine where nothing can be computed, that alone."""
    processor = _processor(machine)
    if not processor.is_used:
        return (processor,)
    return (
        processor,
        *_cards(machine),
        _memory(machine),
        *_disks(machine.places),
        _hub(machine.network),
    )


def _processor(machine: Machine) -> Use:
    facts = machine.processor
    if facts.isas is None or machine.torch.error:
        missing = "torch" if machine.torch.error else "the native module"
        why = f"{missing} cannot be loaded, so that nothing can be computed"
        return Use("processor", False, "not used", why, "see above")
    threads = f"{facts.threads} thread{'s' if facts.threads > 1 else ''}"
    return Use("processor", True, f"{threads}, kernels {facts.isas[0]}")


def _cards(machine: Machine) -> list[Use]:
    """Of reasons against a card, the one that must be mended first."""
    nvidia, torch = machine.nvidia, machine.torch
    obstacle = driver_obstacle(nvidia)
    if obstacle is not None:
        if machine.computes_on_cards or "NVIDIA" not in nvidia.displays:
            return [_unused("graphics card", obstacle)]
        return [_unused("graphics card", NOT_YET)]
    if machine.computes_on_cards:
        obstacle = age_obstacle(nvidia, torch) or _no_compiler(machine.kernel_cache)
    else:
        obstacle = NOT_YET
    return [_card(machine, card, obstacle) for card in nvidia.cards]


def _card(machine: Machine, card: Card, common: Obstacle | None) -> Use:
    """A card that is too old is told of first: nothing else would mend that. Which build of torch
    there is does not matter: `--device cuda` brings kernels of its own."""
    part = f"card {card.index}"
    obstacle = card_obstacle(card) or common or hidden_obstacle(machine.visible)
    if obstacle is not None:
        return _unused(part, obstacle)
    option = "--device cuda" if len(machine.nvidia.cards) == 1 else "--device cuda or --devices"
    return Use(
        part,
        True,
        f"with {option}: layers and experts, in {gib(card.memory_free)} of its memory",
    )


def _no_compiler(cache: KernelCacheFacts) -> Obstacle | None:
    if not cache.problem:
        return None
    return Obstacle(
        "its kernels cannot be compiled, as cuda-core or NVRTC is missing",
        "`pip install 'localr1[gpu]'`",
    )


def _unused(part: str, obstacle: Obstacle) -> Use:
    return Use(part, False, "not used", obstacle.why, obstacle.fix)


def _memory(machine: Machine) -> Use:
    return Use("RAM", True, f"up to {gib(machine.memory_budget)} for a model and its context")


def _disks(places: tuple[Place, ...]) -> list[Use]:
    """Models are read from the first two; a place that nothing can be written in is still read."""
    found = []
    for name, what in (
        ("data", "quantized models, and experts that RAM has no room for"),
        ("hub cache", "downloads"),
    ):
        for place in places:
            if place.name != name:
                continue
            if place.error:
                found.append(
                    Use(
                        name,
                        place.exists,
                        "read, not written" if place.exists else "not used",
                        f"nothing can be written in {place.nearest} ({place.error})",
                        "see above",
                    )
                )
            else:
                found.append(Use(name, True, f"{what}, in {place.path}"))
    return found


def _hub(network: NetworkFacts) -> Use:
    if network.is_offline:
        return Use("Hub", False, "not used", "HF_HUB_OFFLINE is set", "unset it to pull models")
    return Use("Hub", True, "by `localr1 pull` alone")
