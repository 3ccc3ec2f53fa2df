"""Machines that a test plants, and what `localr1 doctor` says of each."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from localr1.doctor import memory as memory_module
from localr1.doctor.finding import Finding, Verdict, listed, sentence
from localr1.doctor.memory import MemoryFacts, memory_findings, read_memory
from localr1.doctor.power import (
    WINDOWS_POWER_SAVER,
    PowerFacts,
    power_findings,
    read_power,
)
from localr1.doctor.processor import ProcessorFacts, processor_findings, read_processor
from localr1.doctor.sizes import age
from localr1.doctor.software import (
    Package,
    SoftwareFacts,
    TorchFacts,
    parse_requirement,
    read_packages,
    software_findings,
)
from localr1.doctor.storage import Place, read_places, storage_findings
from localr1.doctor.terminal import TerminalFacts, terminal_findings

GIB = 1 << 30
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' files")


def by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert bool(finding.why) == (finding.verdict is not Verdict.OK), finding
        assert not finding.why.endswith("."), finding
        assert not finding.fix.endswith("."), finding
    return {finding.name: finding for finding in findings}


def test_sentences() -> None:
    assert sentence("", "mend it") == ""
    assert sentence("it broke", "") == "It broke."
    assert sentence("it broke", "mend it") == "It broke: mend it."
    assert sentence("localr1 broke", "") == "localr1 broke."
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([]) == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "just now"),
        (59, "just now"),
        (60, "1 minute ago"),
        (7300, "2 hours ago"),
        (86400 * 40, "40 days ago"),
    ],
)
def test_ages(seconds: float, said: str) -> None:
    assert age(seconds) == said


# Memory


MEMORY = MemoryFacts(32 * GIB, 28 * GIB, 8 * GIB, 0)


def test_memory_that_is_fine() -> None:
    found = by_name(memory_findings(MEMORY))
    assert found["RAM"] == Finding("RAM", "32.0 GiB, 28.0 GiB free")
    assert found["swap"].value == "0.0 GiB of 8.0 GiB used"
    assert by_name(memory_findings(replace(MEMORY, swap_total=0)))["swap"].value == "none"
    assert MEMORY.usable == 28 * GIB


def test_memory_that_others_have_taken() -> None:
    ram = by_name(memory_findings(replace(MEMORY, available=2 * GIB)))["RAM"]
    assert ram.verdict is Verdict.PROBLEM
    assert ram.sentence == (
        "Only 2.0 GiB can be had now, and the smallest R1 distill takes 2.3 GiB at 4 bits: close "
        "other programs, or chat with r1-nano, which takes little."
    )


def test_a_machine_with_little_memory() -> None:
    small = replace(MEMORY, total=4 * GIB, available=3 * GIB)
    ram = by_name(memory_findings(small))["RAM"]
    assert ram.verdict is Verdict.NOTE
    assert "keep to r1-distill-qwen-1.5b" in ram.fix
    assert ".wslconfig" in by_name(memory_findings(replace(small, is_wsl=True)))["RAM"].fix


def test_a_container_that_may_take_less_than_the_machine_has() -> None:
    facts = replace(MEMORY, limit=8 * GIB, limit_used=6 * GIB, limit_file="/cgroup/memory.max")
    found = by_name(memory_findings(facts))
    assert facts.usable == 2 * GIB
    assert found["RAM"].verdict is Verdict.PROBLEM, "what counts is what the container may take"
    limit = found["memory limit"]
    assert limit.value == "8.0 GiB, 2.0 GiB of it free"
    assert limit.why.startswith("this container may take 8.0 GiB of the machine's 32.0 GiB (/cgr")
    assert replace(facts, limit_used=9 * GIB).usable == 0
    assert replace(facts, available=GIB).usable == GIB


@LINUX
def test_limits_are_read(tmp_path: Path) -> None:
    total = int(psutil.virtual_memory().total)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "proc" / "version").write_text("Linux version 6.6-microsoft-standard-WSL2")
    limit = tmp_path / "sys" / "fs" / "cgroup" / "memory.max"
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{total // 2}\n")
    facts = read_memory(tmp_path)
    assert (facts.total, facts.limit, facts.limit_file) == (total, total // 2, str(limit))
    assert facts.is_wsl
    limit.write_text(f"{total}\n")
    assert read_memory(tmp_path).limit is None, "no tighter than the machine"


def test_memory_that_was_short() -> None:
    swap = by_name(memory_findings(replace(MEMORY, swap_used=GIB)))["swap"]
    assert swap.verdict is Verdict.NOTE
    assert "read back at the disk's speed: close other programs" in swap.sentence
    small = memory_module.SWAP_WORTH_A_WORD - 1
    assert by_name(memory_findings(replace(MEMORY, swap_used=small)))["swap"].why == ""


# The processor


PROCESSOR = ProcessorFacts(
    "Ryzen", "x86_64", 8, 16, 16, 8, False, ("avx2", "fma", "f16c"), ("avx2", "generic")
)


def test_a_processor_that_is_fine() -> None:
    found = by_name(processor_findings(PROCESSOR))
    assert found["processor"].value == "Ryzen, x86_64, 8 cores, 16 hardware threads"
    assert found["features"].value == "avx2, fma, f16c"
    assert found["kernels"].value == "avx2 (of avx2, generic)"
    assert found["threads"] == Finding("threads", "8")


@pytest.mark.parametrize(
    ("architecture", "features", "why", "fix"),
    [
        ("x86_64", (), "does not offer AVX2", "choose small models"),
        ("AMD64", None, "does not offer AVX2", "choose small models"),
        ("x86_64", ("avx2",), "has AVX2, but not FMA and F16C beside it", "QEMU: -cpu host"),
        ("arm64", ("asimd",), "no kernels written for arm64 yet", "an x86 processor"),
        ("aarch64", None, "no kernels written for aarch64 yet", "an x86 processor"),
    ],
)
def test_processors_without_kernels_of_their_own(
    architecture: str, features: tuple[str, ...] | None, why: str, fix: str
) -> None:
    facts = replace(PROCESSOR, architecture=architecture, features=features, isas=("generic",))
    found = by_name(processor_findings(facts))
    assert found["kernels"].verdict is Verdict.NOTE
    assert why in found["kernels"].why
    assert fix in found["kernels"].fix
    assert features is not None or found["features"].value == "not told by this system"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quota": 2.0}, "the time of 2 processors, and more threads than that wait for each"),
        ({"quota": 0.5, "threads": 2}, "set LOCALR1_THREADS=1"),
        ({"threads": 16, "chosen": True}, "8 cores for them"),
        ({"allowed": 4}, "set LOCALR1_THREADS=4"),
        ({"threads": 2, "chosen": True}, "6 of 8 cores stay idle"),
    ],
)
def test_threads_that_do_not_suit(changes: dict[str, object], said: str) -> None:
    facts = replace(PROCESSOR, **changes)  # type: ignore[arg-type]
    threads = by_name(processor_findings(facts))["threads"]
    assert threads.verdict is Verdict.NOTE
    assert said in threads.sentence
    assert threads.value.endswith("(LOCALR1_THREADS)") == facts.chosen
    assert by_name(processor_findings(replace(PROCESSOR, quota=8.0)))["threads"].why == ""


CPUINFO = """processor : 0
model name : Some Processor @ 3 GHz
flags : fpu avx2 fma f16c avx512f sse2

processor : 1
model name : Another
flags : fpu
"""


def test_processors_are_read_on_every_system(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(CPUINFO)
    facts = read_processor(("avx2",), 4, None, tmp_path, "linux")
    assert facts.name == "Some Processor @ 3 GHz"
    assert facts.features == ("avx2", "fma", "f16c", "avx512f")
    assert (facts.threads, facts.chosen, facts.quota) == (4, False, None)
    (tmp_path / "proc" / "cpuinfo").write_text("Features : fp asimd asimddp\n")
    assert read_processor(None, None, 3, tmp_path, "linux").features == ("asimd", "asimddp")
    empty = read_processor(None, None, 3, tmp_path / "empty", "linux")
    assert (empty.features, empty.threads, empty.chosen) == (None, 3, True)

    def intel_mac(command: Sequence[str]) -> str:
        return "Intel(R) Core(TM) i9\n" if "brand" in command[-1] else "FPU AVX1.0 FMA F16C\nAVX2\n"

    facts = read_processor(("avx2",), 4, None, tmp_path, "darwin", intel_mac)
    assert facts.name == "Intel(R) Core(TM) i9"
    assert facts.features == ("avx2", "fma", "f16c")
    mac = read_processor(("generic",), 4, None, tmp_path, "darwin", lambda command: "")
    assert mac.features == ("asimd",)


# Power


def plant_governor(root: Path, **files: str) -> Path:
    folder = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("governor", "driver", "preference", "said"),
    [
        ("powersave", "acpi-cpufreq", "", "keeps the processor at its lowest frequency: `sudo cp"),
        ("powersave", "intel_cpufreq", "", "keeps the processor at its lowest frequency"),
        ("powersave", "intel_pstate", "balance_performance", ""),
        ("powersave", "amd-pstate-epp", "power", "is told to prefer low power to speed"),
        ("performance", "acpi-cpufreq", "", ""),
        ("schedutil", "acpi-cpufreq", "", ""),
    ],
)
def test_governors(tmp_path: Path, governor: str, driver: str, preference: str, said: str) -> None:
    files = {"scaling_governor": governor, "scaling_driver": driver}
    if preference:
        files["energy_performance_preference"] = preference
    facts = replace(read_power(plant_governor(tmp_path, **files), "linux"), on_battery=None)
    (power,) = by_name(power_findings(facts)).values()
    assert said in power.sentence
    assert bool(said) == (power.verdict is Verdict.NOTE)
    assert power.value.startswith(governor)


@pytest.mark.parametrize("saves", [True, False])
def test_power_plans_of_windows_and_macos(tmp_path: Path, saves: bool) -> None:
    plan = WINDOWS_POWER_SAVER.upper() if saves else "381b4222-f694-41f0-9685-ff5bb260df2e"

    def windows(command: Sequence[str]) -> str:
        return f"GUID: {plan}  (x)" if command[0] == "powercfg" else ""

    def macos(command: Sequence[str]) -> str:
        return f" standby 1\n lowpowermode         {int(saves)}\n" if command[0] == "pmset" else ""

    for facts in (read_power(tmp_path, "win32", windows), read_power(tmp_path, "darwin", macos)):
        assert facts.saves_power is saves
        (power,) = power_findings(replace(facts, on_battery=None))
        assert ("power saver is on" in power.why) == saves
    for system in ("win32", "darwin"):
        assert read_power(tmp_path, system, lambda command: "").saves_power is None


def test_a_laptop_on_battery() -> None:
    (power,) = power_findings(PowerFacts("schedutil", "acpi-cpufreq", on_battery=True))
    assert power.sentence == "Most laptops compute more slowly on battery: plug it in."
    assert power_findings(PowerFacts(on_battery=False))[0].verdict is Verdict.OK


# Storage


PLACE = Place("data", "/home/me/data", True, "/home/me/data", "", 500 * GIB, 200 * GIB, 7)


def test_places_that_are_fine() -> None:
    (data,) = storage_findings((PLACE,))
    assert data == Finding("data", "/home/me/data, 200.0 GiB free of 500.0 GiB")
    (cache,) = storage_findings((replace(PLACE, name="cache", free=GIB, exists=False),))
    assert cache.value.endswith(", not made yet")
    assert cache.verdict is Verdict.OK, "the cache holds little"
    (unknown,) = storage_findings((replace(PLACE, total=0, free=0),))
    assert unknown == Finding("data", "/home/me/data, free space not told")


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({"free": GIB}, Verdict.PROBLEM, "too full for even the smallest R1 distill (3.3 GiB as"),
        ({"free": 10 * GIB}, Verdict.NOTE, "7B distill takes 14.2 GiB as published"),
        ({"name": "state", "free": 5 << 20}, Verdict.PROBLEM, "full but for 5 MiB"),
        ({"error": "Read-only file system"}, Verdict.PROBLEM, "written in /home/me/data (Read-on"),
        ({"name": "hub cache", "free": 0}, Verdict.PROBLEM, "a folder elsewhere in HF_HUB_CACHE"),
    ],
)
def test_places_that_are_not(changes: dict[str, object], verdict: Verdict, said: str) -> None:
    (finding,) = storage_findings((replace(PLACE, **changes),))  # type: ignore[arg-type]
    assert finding.verdict is verdict
    assert said in finding.sentence


def test_places_are_tried_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data, below, blocked = read_places(
        {
            "data": tmp_path,
            "hub cache": tmp_path / "a" / "b",
            "cache": tmp_path / "file" / "cache",
        }
    )
    assert (data.exists, data.error, data.nearest) == (True, "", str(tmp_path))
    assert data.total >= data.free > 0
    assert (below.exists, below.error, below.nearest) == (False, "", str(tmp_path))
    assert below.device == data.device
    assert blocked.error == "it is not a folder"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_a_folder_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    (place,) = read_places({"data": tmp_path})
    assert place.error == "Read-only file system"


# Software


SOFTWARE = SoftwareFacts(
    "0.1.0", "3.13.1", "Linux", TorchFacts("2.13.0+cpu"), "", (Package("numpy", "2.4.6", "1.26"),)
)


def test_software_that_is_fine() -> None:
    found = by_name(software_findings(SOFTWARE))
    assert found["torch"].value == "2.13.0+cpu, a build without CUDA"
    assert found["packages"].value == "numpy 2.4.6"
    built = replace(SOFTWARE, torch=TorchFacts("2.13.0+cu130", cuda="13.0"))
    assert by_name(software_findings(built))["torch"].value == "2.13.0+cu130, built for CUDA 13.0"


@pytest.mark.parametrize(
    ("changes", "name", "is_fatal", "said"),
    [
        (
            {"torch": TorchFacts(error="ImportError: libtorch.so")},
            "torch",
            True,
            "computes nothing (ImportError: libtorch.so): `pip install --force-reinstall torch`",
        ),
        (
            {"native_error": "ImportError: wrong Python"},
            "native module",
            True,
            "its kernels localr1 computes nothing (ImportError: wrong Python): install localr1",
        ),
        (
            {"packages": (Package("tokenizers", None, "0.21"),)},
            "tokenizers",
            True,
            "localr1 needs the package tokenizers: `pip install 'tokenizers>=0.21'`.",
        ),
        ({"packages": (Package("gguf", None),)}, "gguf", False, "`pip install 'gguf'`"),
        (
            {"packages": (Package("jinja2", "3.1.4", "3.1.6"),)},
            "jinja2",
            False,
            "needs jinja2 3.1.6 or newer",
        ),
    ],
)
def test_software_that_is_not(
    changes: dict[str, object], name: str, is_fatal: bool, said: str
) -> None:
    findings = software_findings(replace(SOFTWARE, **changes))  # type: ignore[arg-type]
    finding = by_name(findings)[name]
    assert finding.verdict is Verdict.PROBLEM
    assert finding.is_fatal is is_fatal
    assert said in finding.sentence
    assert sum(each.is_fatal for each in findings) == is_fatal


def test_versions_are_compared_as_numbers() -> None:
    assert Package("a", "2.9.1", "2.10").is_too_old
    assert not Package("a", "2.10+cpu", "2.9").is_too_old
    assert not Package("a", "2.8", "2.8").is_too_old
    assert not Package("a", "unknown", "").is_too_old
    assert not Package("a", None, "1").is_too_old


def test_requirements_are_those_of_the_metadata() -> None:
    assert parse_requirement("torch>=2.8") == ("torch", "2.8")
    assert parse_requirement('pexpect>=4.9; sys_platform != "win32"') == ("pexpect", "4.9")
    assert parse_requirement("nvidia-ml-py") == ("nvidia-ml-py", "")
    found = {package.name: package for package in read_packages()}
    assert {"torch", "nvidia-ml-py", "tokenizers"} <= set(found)
    assert found["torch"].required
    assert "pytest" not in found, "a test tool is no requirement"
    assert not any(package.found is None or package.is_too_old for package in found.values())


# The terminal and the clock


TERMINAL = TerminalFacts(
    is_terminal=True,
    encoding="utf-8",
    locale="de_DE.UTF-8",
    terminal="xterm-256color",
    columns=120,
    colors="256",
    color_variable="",
    is_windows=False,
    now=1_800_000_000.0,
    installed=1_790_000_000.0,
)


def test_a_terminal_that_is_fine() -> None:
    found = by_name(terminal_findings(TERMINAL))
    assert found["text"].value == "utf-8 (de_DE.UTF-8)"
    assert found["terminal"].value == "xterm-256color, 120 columns, 256 colours"
    assert found["clock"].value == "2027-01-15 08:00 UTC"
    plain = replace(TERMINAL, colors="", color_variable="NO_COLOR")
    assert "no colours (NO_COLOR)" in by_name(terminal_findings(plain))["terminal"].value
    piped = replace(TERMINAL, is_terminal=False, columns=1)
    assert by_name(terminal_findings(piped))["terminal"].verdict is Verdict.OK


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "said"),
    [
        ({"encoding": "ascii"}, "text", Verdict.NOTE, "set LANG to a locale with UTF-8"),
        ({"encoding": "cp1252", "is_windows": True}, "text", Verdict.NOTE, "set PYTHONUTF8=1"),
        ({"terminal": "dumb"}, "terminal", Verdict.NOTE, "cannot move its cursor"),
        ({"columns": 40}, "terminal", Verdict.NOTE, "widen the window"),
        ({"now": 0.0}, "clock", Verdict.PROBLEM, "before localr1 was installed (2026-09-21"),
    ],
)
def test_terminals_and_clocks_that_are_not(
    changes: dict[str, object], name: str, verdict: Verdict, said: str
) -> None:
    facts = replace(TERMINAL, **changes)  # type: ignore[arg-type]
    finding = by_name(terminal_findings(facts))[name]
    assert finding.verdict is verdict
    assert said in finding.sentence
    assert os.linesep not in finding.sentence
