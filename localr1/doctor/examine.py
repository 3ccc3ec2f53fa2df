"""Reads every area of the machine, and makes the report."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localr1 import __version__
from localr1.doctor.cards import card_findings, torch_obstacle
from localr1.doctor.finding import Report, Section
from localr1.doctor.kernel_cache import kernel_cache_findings, read_kernel_cache
from localr1.doctor.memory import memory_findings, read_memory
from localr1.doctor.network import network_findings, read_network
from localr1.doctor.nvidia import read_nvidia
from localr1.doctor.power import power_findings, read_power
from localr1.doctor.processor import processor_findings, read_processor
from localr1.doctor.software import (
    read_native,
    read_software,
    read_torch,
    software_findings,
)
from localr1.doctor.speeds import SpeedFacts, read_speeds, speed_findings
from localr1.doctor.storage import read_places, storage_findings
from localr1.doctor.terminal import read_terminal, terminal_findings
from localr1.doctor.uses import Machine, computes_on_cards, uses_of
from localr1.settings import Settings, Surroundings


def examine(
    settings: Settings, surroundings: Surroundings, console: Any, *, measure: bool
) -> Report:
    """console: rich's of stdout. measure: anew, which takes seconds; else what is remembered."""
    torch, native = read_torch(), read_native()
    computes = not torch.error and not native.error
    software = read_software(__version__, torch, native)
    processor = read_processor(native.isas, _threads(computes), settings.threads)
    # Before anything is measured: what that takes is given back, but not all at once.
    memory = read_memory()
    power = read_power()
    nvidia = read_nvidia()
    kernel_cache = read_kernel_cache(settings.cache_dir)
    places = read_places(
        {
            "data": settings.data_dir,
            "hub cache": settings.hub_cache,
            "cache": settings.cache_dir,
            "state": settings.state_dir,
        }
    )
    network = read_network(surroundings)
    terminal = read_terminal(surroundings, console, Path(__file__))
    speeds = SpeedFacts()
    if computes:
        usable = torch_obstacle(torch, nvidia.cards, surroundings.visible_cards) is None
        speeds = read_speeds(
            settings.cache_dir,
            settings.threads,
            places,
            {card.uuid: card.index for card in nvidia.cards} if usable else {},
            anew=measure,
        )
    machine = Machine(
        processor=processor,
        memory=memory,
        memory_budget=_budget(memory.usable),
        nvidia=nvidia,
        torch=torch,
        kernel_cache=kernel_cache,
        computes_on_cards=computes and computes_on_cards(),
        visible=surroundings.visible_cards,
        places=places,
        network=network,
    )
    cards = (
        *card_findings(
            nvidia,
            torch,
            surroundings.visible_cards,
            computes_on_cards=machine.computes_on_cards,
        ),
        *kernel_cache_findings(kernel_cache),
    )
    sections = (
        Section("software", software_findings(software)),
        Section("processor", (*processor_findings(processor), *power_findings(power))),
        Section("graphics", cards),
        Section("memory", memory_findings(memory)),
        Section("storage", storage_findings(places)),
        Section("speed", speed_findings(speeds, processor.threads, time.time())),
        Section("network", network_findings(network)),
        Section("terminal", terminal_findings(terminal)),
    )
    facts = {
        "software": asdict(software),
        "processor": asdict(processor),
        "power": asdict(power),
        "nvidia": asdict(nvidia),
        "compiled_kernels": asdict(kernel_cache),
        "memory": asdict(memory),
        "places": [asdict(place) for place in places],
        "speeds": asdict(speeds),
        "network": asdict(network),
        "terminal": asdict(terminal),
    }
    return Report(sections, uses_of(machine), facts)


def _threads(computes: bool) -> int | None:
    if not computes:
        return None
    from localr1.kernels.native import default_threads

    return default_threads()


def _budget(usable: int) -> int:
    """As loading a model counts it."""
    from localr1.experts.placement import default_budget

    return default_budget(usable)
