"""Python, torch, the packages that matter, and localr1's own native module."""

import importlib.metadata
import platform
import re
import warnings
from dataclasses import dataclass
from typing import Final

from localr1.doctor.finding import Finding, Verdict

ESSENTIAL: Final = ("torch", "numpy", "safetensors", "tokenizers", "jinja2")
"""Without these no model can be opened, or no prompt made for it."""
SHOWN_IF_THERE: Final = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")
"""What compiles kernels for a graphics card."""


@dataclass(frozen=True)
class Package:
    """found: its version, None where it is not installed. required: at least, "" for any."""

    name: str
    found: str | None
    required: str = ""

    @property
    def is_too_old(self) -> bool:
        return self.found is not None and numbers(self.found) < numbers(self.required)


@dataclass(frozen=True)
class TorchFacts:
    """version: "" where it cannot be imported; error then says why. cuda: that it was built for,
    None for a build without. sees_cards: torch.cuda.is_available(). architectures: that its own
    kernels were compiled for, as "sm_89" and "compute_120". warning: what it said on looking for
    cards."""

    version: str = ""
    error: str = ""
    cuda: str | None = None
    sees_cards: bool = False
    architectures: tuple[str, ...] = ()
    warning: str = ""


@dataclass(frozen=True)
class SoftwareFacts:
    """native_error: why the native module cannot be loaded, "" where it can."""

    localr1: str
    python: str
    system: str
    torch: TorchFacts
    native_error: str
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Native:
    """isas: builds of the kernels that run here, best first; None with an error."""

    isas: tuple[str, ...] | None
    error: str = ""


def read_native() -> Native:
    try:
        from localr1.kernels import _native

        return Native(tuple(_native.available_isas()))
    except Exception as error:  # A module built for another Python or system raises what it likes.
        return Native(None, f"{type(error).__name__}: {error}"[:300])


def read_torch() -> TorchFacts:
    """Imports torch: the slowest part of all, and the only proof that it works."""
    try:
        import torch
    except Exception as error:  # Also OSError, for a library that it lacks.
        return TorchFacts(error=f"{type(error).__name__}: {error}"[:300])
    cuda = torch.version.cuda
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sees_cards = cuda is not None and torch.cuda.is_available()
    return TorchFacts(
        version=str(torch.__version__),
        cuda=cuda,
        sees_cards=sees_cards,
        architectures=tuple(torch.cuda.get_arch_list()) if sees_cards else (),
        warning=" ".join(str(told[0].message).split())[:200] if told else "",
    )


def read_software(localr1: str, torch: TorchFacts, native: Native) -> SoftwareFacts:
    return SoftwareFacts(
        localr1=localr1,
        python=platform.python_version(),
        system=platform.platform(),
        torch=torch,
        native_error=native.error,
        packages=read_packages(),
    )


def read_packages() -> tuple[Package, ...]:
    """Those that localr1's own metadata asks for, and what of SHOWN_IF_THERE is there."""
    try:
        lines = importlib.metadata.requires("localr1") or []
    except importlib.metadata.PackageNotFoundError:  # Run from a folder, not installed.
        lines = list(ESSENTIAL)
    wanted = [parse_requirement(line) for line in lines if "extra ==" not in line]
    found = [Package(name, _version(name), required) for name, required in wanted]
    extras = [Package(name, _version(name)) for name in SHOWN_IF_THERE]
    return (*found, *(each for each in extras if each.found is not None))


def parse_requirement(line: str) -> tuple[str, str]:
    """("torch", "2.8") of "torch>=2.8", as localr1 writes its requirements."""
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:>=\s*([\w.]+))?.*", line, re.DOTALL)
    return (match[1], match[2] or "") if match else (line, "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare: (2, 13, 0) of "2.13.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def software_findings(facts: SoftwareFacts) -> tuple[Finding, ...]:
    return (
        Finding("localr1", facts.localr1),
        Finding("Python", facts.python),
        Finding("system", facts.system),
        _torch(facts.torch),
        _native(facts.native_error),
        *_packages(facts.packages),
    )


def _torch(facts: TorchFacts) -> Finding:
    if facts.error:
        return Finding(
            "torch",
            "cannot be imported",
            Verdict.PROBLEM,
            f"without torch localr1 computes nothing ({facts.error})",
            "`pip install --force-reinstall torch` into the Python that runs localr1",
            is_fatal=True,
        )
    build = "a build without CUDA" if facts.cuda is None else f"built for CUDA {facts.cuda}"
    return Finding("torch", f"{facts.version}, {build}")


def _native(error: str) -> Finding:
    if not error:
        return Finding("native module", "loaded")
    return Finding(
        "native module",
        "cannot be loaded",
        Verdict.PROBLEM,
        f"without its kernels localr1 computes nothing ({error})",
        "install localr1 again, with a C++ compiler at hand and the Python that runs it",
        is_fatal=True,
    )


def _packages(packages: tuple[Package, ...]) -> list[Finding]:
    shown = [each for each in packages if each.found is not None and each.name != "torch"]
    found = [Finding("packages", ", ".join(f"{each.name} {each.found}" for each in shown))]
    for each in packages:
        if each.found is None:
            found.append(
                Finding(
                    each.name,
                    "missing",
                    Verdict.PROBLEM,
                    f"localr1 needs the package {each.name}",
                    f"`pip install '{each.name}{f'>={each.required}' if each.required else ''}'`",
                    is_fatal=each.name in ESSENTIAL,
                )
            )
        elif each.is_too_old:
            found.append(
                Finding(
                    each.name,
                    each.found,
                    Verdict.PROBLEM,
                    f"localr1 needs {each.name} {each.required} or newer",
                    f"`pip install '{each.name}>={each.required}'`",
                )
            )
    return found
