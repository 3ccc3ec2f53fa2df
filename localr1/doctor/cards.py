"""Graphics cards: what each is, and what keeps one from being computed on."""

from dataclasses import dataclass, replace
from typing import Final

from localr1.doctor.finding import Finding, Verdict, listed
from localr1.doctor.nvidia import Card, DriverState, NvidiaFacts
from localr1.doctor.sizes import gib
from localr1.doctor.software import TorchFacts, numbers

OLDEST_CAPABILITY: Final = (7, 5)
"""Turing: integer dot products, and the oldest that NVRTC 13 compiles for."""
OLDEST_CUDA: Final = 12
"""The oldest major version that the CUDA builds of torch 2.8 and later were made for."""
DRIVERS: Final = {11: "450", 12: "525", 13: "580"}
"""The first driver of each major version of CUDA, whose later minor versions it runs too (NVIDIA's
release notes of the CUDA toolkit)."""
OTHERS_MEMORY: Final = 1 << 30
"""Bytes that a desktop and its browser may take of a card without a word."""
TORCH_BUILDS: Final = "https://pytorch.org/get-started/locally"
"""Lists the commands that install each."""


@dataclass(frozen=True)
class Obstacle:
    """Why no card, or not this one, can be computed on. why, fix: clauses, as of a Finding."""

    why: str
    fix: str
    verdict: Verdict = Verdict.NOTE


def driver_obstacle(facts: NvidiaFacts) -> Obstacle | None:
    """What keeps the driver from answering."""
    has_card = "NVIDIA" in facts.displays
    if facts.state is DriverState.READY:
        if facts.cards:
            return None
        return Obstacle(
            "the driver knows no card",
            "in a container, start it with --gpus all; else see whether `nvidia-smi` lists one",
        )
    if facts.state is DriverState.NO_DRIVER and has_card:
        return Obstacle(
            "an NVIDIA card is in this machine, but no driver for it was found",
            "install NVIDIA's driver, or, in a container, the NVIDIA Container Toolkit outside it, "
            "and start it with --gpus all",
            Verdict.PROBLEM,
        )
    if facts.state is DriverState.NO_DRIVER:
        others = [maker for maker in dict.fromkeys(facts.displays) if maker != "NVIDIA"]
        seen = f" (the graphics are {listed(others)}'s)" if others else ""
        return Obstacle(
            f"there is no NVIDIA card here, or no driver for one{seen}",
            "nothing needs to be done, for the CPU computes everything; a card from the RTX 20 "
            "series on with NVIDIA's driver would be found",
        )
    why, fix = {
        DriverState.NO_PACKAGE: (
            "the package nvidia-ml-py, which asks the driver, is missing",
            "`pip install nvidia-ml-py`",
        ),
        DriverState.NOT_LOADED: (
            "NVIDIA's driver is installed, but not loaded",
            "restart, or `sudo modprobe nvidia` and read what it says; with Secure Boot, the "
            "driver's key must be enrolled",
        ),
        DriverState.MISMATCH: (
            "NVIDIA's driver was updated, and the old one is still loaded",
            "restart the machine",
        ),
        DriverState.NO_PERMISSION: (
            "this user may not open NVIDIA's driver",
            "join the group that owns /dev/nvidia* (often video or render), and log in anew",
        ),
        DriverState.FAILED: (
            f"NVIDIA's driver gave no answer ({facts.detail or 'no reason given'})",
            "see what `nvidia-smi` says, and install the driver anew if it fails too",
        ),
    }[facts.state]
    return Obstacle(why, fix, Verdict.PROBLEM)


def needed_cuda(torch: TorchFacts) -> int:
    """The major version of CUDA that the driver must speak."""
    return max(numbers(torch.cuda or "")[:1], default=OLDEST_CUDA)


def age_obstacle(facts: NvidiaFacts, torch: TorchFacts) -> Obstacle | None:
    """A driver that is too old."""
    needed = needed_cuda(torch)
    if facts.cuda is None or facts.cuda[0] >= needed:
        return None
    speaks = f"the driver {facts.driver} speaks CUDA up to {_dotted(facts.cuda)}, and "
    what = f"torch {torch.version} is built for CUDA {torch.cuda}"
    if torch.cuda is None:
        what = f"localr1 needs CUDA {needed}"
    fix = f"install a driver of version {DRIVERS.get(needed, 'of this year')} or newer"
    if torch.cuda is not None and facts.cuda[0] >= OLDEST_CUDA:
        fix += f", or a torch built for CUDA {facts.cuda[0]} ({TORCH_BUILDS})"
    return Obstacle(speaks + what, fix, Verdict.PROBLEM)


def card_obstacle(card: Card) -> Obstacle | None:
    """A card that is too old."""
    if card.capability is None or card.capability >= OLDEST_CAPABILITY:
        return None
    return Obstacle(
        f"{card.name} has compute capability {_dotted(card.capability)}, and the kernels need "
        f"{_dotted(OLDEST_CAPABILITY)}",
        "only a newer card would help (the RTX 20 series and all after it); the CPU computes "
        "everything",
    )


def torch_obstacle(
    torch: TorchFacts, cards: tuple[Card, ...], visible: str | None
) -> Obstacle | None:
    """Why torch does not compute on these cards. visible: CUDA_VISIBLE_DEVICES, None where it is
    not set."""
    if (hidden := hidden_obstacle(visible)) is not None:
        return hidden
    if torch.error:
        return Obstacle("torch cannot be imported", "see above")
    if torch.cuda is None:
        return Obstacle(
            f"torch {torch.version} was built without CUDA",
            f"install a build for the driver's CUDA ({TORCH_BUILDS})",
        )
    if not torch.sees_cards:
        said = f" ({torch.warning})" if torch.warning else ""
        return Obstacle(
            f"torch {torch.version} (CUDA {torch.cuda}) cannot open the card that the driver lists"
            f"{said}",
            "see what `python -c 'import torch; torch.cuda.init()'` says; after an update of the "
            "driver or a suspend, a restart often mends it",
            Verdict.PROBLEM,
        )
    unknown = [card for card in cards if not _is_built_for(torch, card)]
    if torch.architectures and unknown:
        return Obstacle(
            f"torch {torch.version} has no kernels for compute capability "
            f"{_dotted(unknown[0].capability or (0, 0))} ({unknown[0].name})",
            f"install a build for a newer CUDA ({TORCH_BUILDS})",
            Verdict.PROBLEM,
        )
    return None


def hidden_obstacle(visible: str | None) -> Obstacle | None:
    """visible: CUDA_VISIBLE_DEVICES, None where it is not set."""
    if visible is None or visible.strip() not in ("", "-1", "NoDevFiles"):
        return None
    return Obstacle(
        f"CUDA_VISIBLE_DEVICES={visible.strip()!r} hides every card",
        "unset it, or give it the number of a card",
    )


def _is_built_for(torch: TorchFacts, card: Card) -> bool:
    """Binaries run on cards of their generation from their minor version on; "compute" is compiled
    by the driver for any newer card."""
    if card.capability is None:
        return True
    for name in torch.architectures:
        kind, _, digits = name.partition("_")
        if not digits.isdigit() or len(digits) < 2:  # Such as sm_90a, for just one card.
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        same = built[0] == card.capability[0]
        if built <= card.capability and (kind == "compute" or same):
            return True
    return False


def card_findings(
    facts: NvidiaFacts, torch: TorchFacts, visible: str | None, *, computes_on_cards: bool
) -> tuple[Finding, ...]:
    """visible: CUDA_VISIBLE_DEVICES. computes_on_cards: whether this localr1 can at all; where it
    cannot, nothing about a card is a problem."""
    found = _card_findings(facts, torch, visible)
    if computes_on_cards:
        return tuple(found)
    return tuple(
        replace(each, verdict=Verdict.NOTE) if each.verdict is Verdict.PROBLEM else each
        for each in found
    )


def _card_findings(facts: NvidiaFacts, torch: TorchFacts, visible: str | None) -> list[Finding]:
    obstacle = driver_obstacle(facts)
    if facts.state is not DriverState.READY:
        assert obstacle is not None
        return [_finding("driver", "none", obstacle)]
    value = facts.driver or "a driver that does not tell its version"
    if facts.cuda is not None:
        value += f", CUDA up to {_dotted(facts.cuda)}"
    found = [_finding("driver", value, obstacle or age_obstacle(facts, torch))]
    for card in facts.cards:
        found += [_card(card), _memory(card), _link(card)]
    if facts.cards:
        value = torch.version or "none"
        # A driver that is too old explains all that torch says.
        is_old = age_obstacle(facts, torch) is not None
        in_torch = None if is_old else torch_obstacle(torch, facts.cards, visible)
        found.append(_finding("torch", value, in_torch))
    return found


def _finding(name: str, value: str, obstacle: Obstacle | None) -> Finding:
    if obstacle is None:
        return Finding(name, value)
    return Finding(name, value, obstacle.verdict, obstacle.why, obstacle.fix)


def _card(card: Card) -> Finding:
    capability = "not told" if card.capability is None else _dotted(card.capability)
    value = f"{card.name}, compute capability {capability}"
    return _finding(f"card {card.index}", value, card_obstacle(card))


def _memory(card: Card) -> Finding:
    name = f"card {card.index} memory"
    value = f"{gib(card.memory)}, {gib(card.memory_free)} free"
    taken = card.memory - card.memory_free
    if taken <= OTHERS_MEMORY:
        return Finding(name, value)
    programs = [
        f"{each.name} ({each.pid})" + ("" if each.memory is None else f" with {gib(each.memory)}")
        for each in card.processes[:3]
    ]
    who = f", {listed(programs)} among them" if programs else ""
    return Finding(
        name,
        value,
        Verdict.NOTE,
        f"other programs take {gib(taken)} of the card's memory{who}",
        "close them before a model is loaded, or fewer experts fit on the card",
    )


def _link(card: Card) -> Finding:
    name = f"card {card.index} PCIe"
    if card.generation is None or card.width is None:
        return Finding(name, "not told by the driver")
    value = f"{card.generation}.0 x{card.width}"
    width_now = card.width if card.width_now is None else card.width_now
    now = f"{card.generation_now or card.generation}.0 x{width_now}"
    if now != value:
        value += f", now {now}"
    if width_now < card.width:
        return Finding(
            name,
            value,
            Verdict.NOTE,
            f"the card could use {card.width} lanes and has {width_now}, so that experts are "
            f"copied to it at {width_now / card.width:.0%} of the speed",
            "seat it in the slot that the mainboard's manual names for graphics, without a riser",
        )
    return Finding(name, value)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
