"""Whether the system holds the processor back to save power."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.doctor.commands import Command, run
from localr1.doctor.finding import Finding, Verdict

FIXED_AT_LEAST: Final = "powersave"
"""A governor that keeps the lowest frequency, except under drivers that choose it themselves."""
SELF_GOVERNED: Final = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Drivers under which "powersave" is the ordinary, adaptive setting (the kernel's
Documentation/admin-guide/pm/intel_pstate.rst); there the preference decides."""
WINDOWS_POWER_SAVER: Final = "a1841308-3541-4fab-bc81-f71556f74b4a"
"""The GUID of that power plan, in every language of Windows."""


@dataclass(frozen=True)
class PowerFacts:
    """governor, driver, preference: of Linux' cpufreq, "" where it is not there. saves_power: that
    Windows' or macOS' own setting says so; None where there is none. on_battery: None without."""

    governor: str = ""
    driver: str = ""
    preference: str = ""
    saves_power: bool | None = None
    on_battery: bool | None = None


def read_power(
    root: Path = Path("/"),
    system: str = sys.platform,
    command: Command = run,
) -> PowerFacts:
    folder = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    saves_power = None
    if system == "win32":
        active = command(["powercfg", "/getactivescheme"])
        saves_power = WINDOWS_POWER_SAVER in active.lower() if active else None
    elif system == "darwin":
        lines = [line.split() for line in command(["pmset", "-g"]).splitlines()]
        modes = [words[1] for words in lines if len(words) > 1 and words[0] == "lowpowermode"]
        saves_power = modes[0] == "1" if modes else None
    return PowerFacts(
        governor=_word(folder / "scaling_governor"),
        driver=_word(folder / "scaling_driver"),
        preference=_word(folder / "energy_performance_preference"),
        saves_power=saves_power,
        on_battery=_on_battery(),
    )


def _word(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(100).strip()
    except OSError:
        return ""


def _on_battery() -> bool | None:
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, ValueError):  # Not on every system, and drivers err.
        return None
    if battery is None or battery.power_plugged is None:
        return None
    return not battery.power_plugged


def power_findings(facts: PowerFacts) -> tuple[Finding, ...]:
    value = "nothing holds the processor back that this system tells of"
    if facts.governor:
        value = facts.governor
        if facts.preference:
            value += f", preference {facts.preference}"
    elif facts.saves_power is not None:
        value = "saves power" if facts.saves_power else "does not save power"
    return (_held_back(facts, value),)


def _held_back(facts: PowerFacts, value: str) -> Finding:
    if facts.governor == FIXED_AT_LEAST and facts.driver not in SELF_GOVERNED:
        return Finding(
            "power",
            value,
            Verdict.NOTE,
            "the governor powersave keeps the processor at its lowest frequency",
            "`sudo cpupower frequency-set -g schedutil` or performance",
        )
    if facts.governor and facts.preference == "power":
        return Finding(
            "power",
            value,
            Verdict.NOTE,
            "the processor is told to prefer low power to speed",
            "choose the profile balanced or performance (`powerprofilesctl set performance`)",
        )
    if facts.saves_power:
        return Finding(
            "power",
            value,
            Verdict.NOTE,
            "the system's power saver is on, which lowers the processor's frequency",
            "choose a balanced or fast power mode in the system's settings",
        )
    if facts.on_battery:
        return Finding(
            "power",
            f"{value}, on battery",
            Verdict.NOTE,
            "most laptops compute more slowly on battery",
            "plug it in",
        )
    return Finding("power", value)
