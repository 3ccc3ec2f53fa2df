"""Graphics cards that a test plants: what is found, what is used, and what to do about the rest."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_nvml import GIB, FakeCard, FakeNvml, Memory, Process

from localr1.doctor import cards, copies, uses
from localr1.doctor.cards import card_findings, torch_obstacle
from localr1.doctor.copies import copy_speeds
from localr1.doctor.finding import Finding, Use, Verdict
from localr1.doctor.kernel_cache import KernelCacheFacts, kernel_cache_findings, read_kernel_cache
from localr1.doctor.memory import MemoryFacts
from localr1.doctor.network import NetworkFacts
from localr1.doctor.nvidia import DriverState, NvidiaFacts, read_nvidia
from localr1.doctor.processor import ProcessorFacts
from localr1.doctor.software import TorchFacts
from localr1.kernels import gpu_program

CUDA_TORCH = TorchFacts("2.13.0+cu130", "", "13.0", True, ("sm_75", "sm_86", "sm_90", "sm_120"))
CPU_TORCH = TorchFacts("2.13.0+cpu")
COMPILER = KernelCacheFacts(True, "13.0")


def read(nvml: FakeNvml, root: Path = Path("/nowhere")) -> NvidiaFacts:
    return read_nvidia(lambda: nvml, root)


def found(
    facts: NvidiaFacts,
    torch_facts: TorchFacts = CUDA_TORCH,
    visible: str | None = None,
    *,
    computes: bool = True,
) -> dict[str, Finding]:
    findings = card_findings(facts, torch_facts, visible, computes_on_cards=computes)
    return {finding.name.removeprefix("card 0 "): finding for finding in findings}


def used(
    facts: NvidiaFacts,
    torch_facts: TorchFacts = CUDA_TORCH,
    visible: str | None = None,
    cache: KernelCacheFacts = COMPILER,
    *,
    computes: bool = True,
) -> list[Use]:
    machine = uses.Machine(
        processor=ProcessorFacts("cpu", "x86_64", 4, 8, 8, 4, False, (), ("avx2", "generic")),
        memory=MemoryFacts(32 * GIB, 30 * GIB, 0, 0),
        memory_budget=29 * GIB,
        nvidia=facts,
        torch=torch_facts,
        kernel_cache=cache,
        computes_on_cards=computes,
        visible=visible,
        places=(),
        network=NetworkFacts("", "", False, ()),
    )
    return [use for use in uses.uses_of(machine) if "card" in use.part]


def test_a_card_that_is_used() -> None:
    nvml = FakeNvml(FakeCard())
    facts = read(nvml)
    assert not nvml.is_open, "the library is closed again"
    findings = found(facts)
    assert findings["driver"].value == "580.82.07, CUDA up to 13.0"
    assert findings["card 0"].value == "NVIDIA GeForce RTX 3060, compute capability 8.6"
    assert findings["memory"].value == "12.0 GiB, 11.7 GiB free"
    assert findings["PCIe"].value == "4.0 x16, now 1.0 x16"
    assert {finding.verdict for finding in findings.values()} == {Verdict.OK}
    (use,) = used(facts)
    assert use == Use(
        "card 0", True, "with --device cuda: layers and experts, in 11.7 GiB of its memory"
    )


def test_several_cards_are_used() -> None:
    first, second = used(read(FakeNvml(FakeCard(), FakeCard())))
    assert (first.part, second.part) == ("card 0", "card 1")
    assert first.is_used
    assert second.is_used
    assert "with --device cuda or --devices: layers and experts" in second.value


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (12, DriverState.NO_DRIVER, "There is no NVIDIA card here, or no driver for one: nothing"),
        (9, DriverState.NOT_LOADED, "installed, but not loaded: restart, or `sudo modprobe nvi"),
        (18, DriverState.MISMATCH, "was updated, and the old one is still loaded: restart the"),
        (4, DriverState.NO_PERMISSION, "may not open NVIDIA's driver: join the group"),
        (15, DriverState.FAILED, "gave no answer (error 15): see what `nvidia-smi` says"),
    ],
)
def test_a_driver_that_does_not_answer(error: int, state: DriverState, said: str) -> None:
    facts = read(FakeNvml(error=error))
    assert facts.state is state
    driver = found(facts)["driver"]
    assert said in driver.sentence
    expected = Verdict.NOTE if state is DriverState.NO_DRIVER else Verdict.PROBLEM
    assert driver.verdict is expected
    (use,) = used(facts)
    assert not use.is_used
    assert use.sentence == driver.sentence


def test_without_the_library_that_asks_the_driver() -> None:
    def missing() -> None:
        raise ImportError("No module named 'pynvml'")

    facts = read_nvidia(missing, Path("/nowhere"))
    assert facts.state is DriverState.NO_PACKAGE
    assert found(facts)["driver"].fix == "`pip install nvidia-ml-py`"


def plant_display(root: Path, vendor: str) -> None:
    for name, kind in (("bridge", "0x060100"), ("display", "0x030000")):
        folder = root / "sys" / "bus" / "pci" / "devices" / name
        folder.mkdir(parents=True)
        (folder / "class").write_text(f"{kind}\n")
        (folder / "vendor").write_text(f"{vendor}\n")


def test_a_card_without_a_driver(tmp_path: Path) -> None:
    plant_display(tmp_path, "0x10de")
    facts = read(FakeNvml(error=12), tmp_path)
    assert facts.displays == ("NVIDIA",)
    assert "An NVIDIA card is in this machine, but no driver" in found(facts)["driver"].sentence
    assert "--gpus all" in found(facts)["driver"].fix
    assert found(facts)["driver"].verdict is Verdict.PROBLEM


def test_the_card_of_another_maker(tmp_path: Path) -> None:
    plant_display(tmp_path, "0x1002")
    driver = found(read(FakeNvml(error=12), tmp_path))["driver"]
    assert "(the graphics are AMD's)" in driver.why
    assert driver.verdict is Verdict.NOTE


def test_a_driver_without_a_card() -> None:
    assert "The driver knows no card: in a container" in found(read(FakeNvml()))["driver"].sentence


def test_a_driver_too_old_for_torch() -> None:
    facts = read(FakeNvml(FakeCard(), driver="550.54", cuda=12040))
    driver = found(facts)["driver"]
    assert driver.why == (
        "the driver 550.54 speaks CUDA up to 12.4, and torch 2.13.0+cu130 is built for CUDA 13.0"
    )
    assert driver.fix.startswith("install a driver of version 580 or newer, or a torch built for")
    assert driver.verdict is Verdict.PROBLEM
    assert [use.why for use in used(facts)] == [driver.why]
    blind = replace(CUDA_TORCH, sees_cards=False)
    assert found(facts, blind)["torch"].why == "", "the driver explains it"
    older_build = replace(CUDA_TORCH, version="2.13.0+cu126", cuda="12.6")
    assert found(facts, older_build)["driver"].verdict is Verdict.OK, "minor versions do not matter"


def test_a_driver_too_old_for_anything() -> None:
    facts = read(FakeNvml(FakeCard(), driver="470.82", cuda=11040))
    driver = found(facts, CPU_TORCH)["driver"]
    assert driver.sentence == (
        "The driver 470.82 speaks CUDA up to 11.4, and localr1 needs CUDA 12: install a driver of "
        "version 525 or newer."
    )


def test_a_card_too_old() -> None:
    facts = read(FakeNvml(FakeCard(name="NVIDIA GeForce GTX 1080", capability=(6, 1))))
    card = found(facts)["card 0"]
    assert card.why == (
        "NVIDIA GeForce GTX 1080 has compute capability 6.1, and the kernels need 7.5"
    )
    for computes in (True, False):
        assert [use.why for use in used(facts, computes=computes)] == [card.why]
    facts = read(FakeNvml(FakeCard(capability=(7, 5))))
    assert found(facts)["card 0"].verdict is Verdict.OK


def test_torch_without_cuda() -> None:
    facts = read(FakeNvml(FakeCard()))
    assert found(facts, CPU_TORCH)["torch"].sentence == (
        "torch 2.13.0+cpu was built without CUDA: install a build for the driver's CUDA "
        "(https://pytorch.org/get-started/locally)."
    )
    assert used(facts, CPU_TORCH)[0].is_used  # With kernels of localr1's own.


def test_torch_that_cannot_open_the_card() -> None:
    facts = read(FakeNvml(FakeCard()))
    blind = replace(CUDA_TORCH, sees_cards=False, architectures=(), warning="CUDA unknown error")
    finding = found(facts, blind)["torch"]
    assert "cannot open the card that the driver lists (CUDA unknown error)" in finding.why
    assert finding.verdict is Verdict.PROBLEM


@pytest.mark.parametrize(
    ("capability", "architectures", "is_built"),
    [
        ((8, 9), ("sm_86", "sm_90"), True),
        ((8, 0), ("sm_86", "sm_90"), False),
        ((12, 0), ("sm_86", "sm_90"), False),
        ((12, 0), ("sm_86", "compute_90"), True),
        ((9, 0), ("sm_80", "sm_90a"), False),
        ((12, 0), ("sm_120",), True),
    ],
)
def test_cards_that_torch_was_not_built_for(
    capability: tuple[int, int], architectures: tuple[str, ...], is_built: bool
) -> None:
    facts = read(FakeNvml(FakeCard(capability=capability)))
    obstacle = torch_obstacle(replace(CUDA_TORCH, architectures=architectures), facts.cards, None)
    assert (obstacle is None) == is_built
    assert obstacle is None or "has no kernels for compute capability" in obstacle.why


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_cards_that_are_hidden(visible: str) -> None:
    facts = read(FakeNvml(FakeCard()))
    assert "hides every card" in found(facts, visible=visible)["torch"].why
    assert found(facts, visible="0")["torch"].verdict is Verdict.OK


def test_programs_that_fill_the_memory() -> None:
    mine = os.getpid()
    card = FakeCard(
        memory=Memory(8 * GIB, 2 * GIB),
        compute=[Process(mine, 5 * GIB), Process(2**22 + 7, None)],
        graphics=[Process(mine, 5 * GIB)],
    )
    memory = found(read(FakeNvml(card)))["memory"]
    assert memory.verdict is Verdict.NOTE
    assert memory.why.startswith("other programs take 6.0 GiB of the card's memory, python")
    assert f"({mine}) with 5.0 GiB and another user's or container's ({2**22 + 7})" in memory.why


def test_a_slot_that_is_too_narrow() -> None:
    link = found(read(FakeNvml(FakeCard(pcie=(4, 4, 16, 4)))))["PCIe"]
    assert link.value == "4.0 x16, now 4.0 x4"
    assert "could use 16 lanes and has 4, so that experts are copied to it at 25%" in link.why


def test_what_a_driver_does_not_tell() -> None:
    """As in WSL, and with answers in bytes, as older releases of nvidia-ml-py give them."""
    untold = (
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetCurrPcieLinkGeneration",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
    )
    facts = read(FakeNvml(FakeCard(name=b"Tesla \xff"), driver=b"580.1", untold=untold))
    findings = found(facts)
    assert findings["driver"].value == "580.1"
    assert findings["card 0"].value == "Tesla \ufffd, compute capability not told"
    assert findings["PCIe"].value == "not told by the driver"
    assert {finding.verdict for finding in findings.values()} == {Verdict.OK}
    lost = read(FakeNvml(FakeCard(), untold=("nvmlDeviceGetMemoryInfo",)))
    assert lost.state is DriverState.FAILED


def test_a_localr1_that_does_not_compute_on_cards() -> None:
    """Then nothing about a card is a problem, and mending it is not asked for."""
    facts = read(FakeNvml(FakeCard(), cuda=11040))
    assert found(facts, CPU_TORCH, computes=False)["driver"].verdict is Verdict.NOTE
    assert [use.why for use in used(facts, CPU_TORCH, computes=False)] == [uses.NOT_YET.why]
    broken = NvidiaFacts(DriverState.NOT_LOADED, displays=("NVIDIA",))
    assert [use.why for use in used(broken, computes=False)] == [uses.NOT_YET.why]
    assert "modprobe" in used(broken)[0].fix


def test_the_option_is_asked_whether_it_takes_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from localr1.errors import UsageError
    from localr1.experts import options

    try:
        options.parse_device("cuda")
        takes_cards = True
    except UsageError:
        takes_cards = False
    assert uses.computes_on_cards() == takes_cards
    monkeypatch.setattr(options, "parse_device", lambda text: None)
    assert uses.computes_on_cards()


def test_kernels_that_cannot_be_compiled() -> None:
    facts = read(FakeNvml(FakeCard()))
    (use,) = used(facts, cache=KernelCacheFacts(True, "", "GPU kernels cannot be compiled"))
    assert use.fix == "`pip install 'localr1[gpu]'`"


def test_the_oldest_card_is_the_one_that_kernels_are_compiled_for() -> None:
    major, minor = cards.OLDEST_CAPABILITY
    assert 10 * major + minor == gpu_program.OLDEST_CAPABILITY


def test_the_cache_of_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from localr1.doctor import kernel_cache

    monkeypatch.setattr(kernel_cache, "_compiler_version", lambda: None)
    (finding,) = kernel_cache_findings(read_kernel_cache(tmp_path))
    assert finding.value == "none: this localr1 has no kernels for cards"
    monkeypatch.setattr(kernel_cache, "_compiler_version", lambda: ("13.0", ""))
    (finding,) = kernel_cache_findings(read_kernel_cache(tmp_path))
    assert finding.value == "none yet; compiler: NVRTC 13.0"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "matvec-sm_86-0.cubin").write_bytes(bytes(3 << 20))
    (tmp_path / "kernels" / ".cubin-partial").write_bytes(b"x")
    monkeypatch.setattr(kernel_cache, "_compiler_version", lambda: ("13.0", ""))
    (finding,) = kernel_cache_findings(read_kernel_cache(tmp_path))
    assert finding.value == "1 kept, 3.0 MiB; compiler: NVRTC 13.0"
    monkeypatch.setattr(kernel_cache, "_compiler_version", lambda: ("", "missing"))
    (finding,) = kernel_cache_findings(read_kernel_cache(tmp_path))
    assert finding.value == "none: no compiler for them is installed"


def test_copies_are_measured() -> None:
    """From RAM to RAM: no figure is expected, but that every kind of copy has one."""
    waits: list[None] = []
    speeds = copy_speeds(
        3, torch.device("cpu"), 1 << 20, lambda: waits.append(None), page_locked=False
    )
    assert speeds.card == 3
    for each in (speeds.to_card, speeds.from_card, speeds.pageable, speeds.within):
        assert 0.001 < each < 100_000
    assert len(waits) == 4 * 2 * copies.REPETITIONS, (
        "the device is waited for before and after each"
    )
