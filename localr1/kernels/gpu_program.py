"""Compiles the GPU kernels at first use, for the card that is found. It takes no toolchain, only
NVRTC, which comes with CUDA builds of torch, and cuda-core. Results are kept on disk.

Nothing here needs a GPU or a driver: a cubin for any card can be made on any machine.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.errors import KernelError
from localr1.settings import Settings

PROGRAMS: Final = (
    "activations.cu",
    "attention.cu",
    "dequantize.cu",
    "expert_tiles.cu",
    "experts.cu",
    "latent.cu",
    "matmul.cu",
    "matvec.cu",
    "router.cu",
    "sampling.cu",
)
"""Every file of cuda/gpu with kernels, each compiled by itself."""

OLDEST_CAPABILITY: Final = 75
"""Turing: the oldest that NVRTC 13 compiles for, and that has the integer dot product and
independent threads these kernels are written for."""

_MAGIC: Final = b"localr1 cubin 1\n"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Compiled:
    """cubin: what a driver loads. log: what ptxas said of each kernel (registers, spills)."""

    cubin: bytes
    log: str


def installed_sources() -> Path:
    """The folder that has blocks.h, dequant.h and gpu/, as the package brings them."""
    from localr1.kernels import _native

    return Path(_native.__file__).parent


def kept_programs(
    settings: Settings, progress: Callable[[str], None] = lambda line: None
) -> "ProgramCache":
    """The cache of this user, for the sources that the package brings."""
    return ProgramCache(settings.cache_dir / "gpu", installed_sources(), progress)


def compiler_version() -> str:
    """NVRTC's, as "13.5". Raises KernelError where NVRTC or cuda-core is missing."""
    try:
        from cuda.bindings import nvrtc

        major, minor = nvrtc.nvrtcVersion()[1:]
    except Exception as error:  # An ImportError, or whatever the loader of libraries raises.
        raise _missing(error) from None
    return f"{major}.{minor}"


def architecture(capability: int) -> str:
    """The architecture to compile for on a card of this compute capability (89 for 8.9): its own,
    or the newest below it of the same generation, whose programs it runs.

    Raises KernelError for a card that is too old, or too new for this NVRTC.
    """
    try:
        from cuda.bindings import nvrtc

        known = [int(each) for each in nvrtc.nvrtcGetSupportedArchs()[1]]
    except Exception as error:
        raise _missing(error) from None
    if capability < OLDEST_CAPABILITY:
        raise KernelError(
            "graphics card",
            expected=f"compute capability {_dotted(OLDEST_CAPABILITY)} or newer",
            found=_dotted(capability),
            fix="The CPU computes everything on this machine.",
        )
    able = [each for each in known if each <= capability and each // 10 == capability // 10]
    if not able:
        raise KernelError(
            "graphics card",
            expected=f"a compute capability that NVRTC {compiler_version()} compiles for, "
            f"up to {_dotted(max(known))}",
            found=_dotted(capability),
            fix="Install a newer nvidia-cuda-nvrtc.",
        )
    return f"sm_{max(able)}"


def compile_program(sources: Path, file: str, arch: str, rows_per_block: int) -> Compiled:
    """Compile sources/gpu/FILE. rows_per_block: 16 or 8, of the CPU's row blocks, whose bytes the
    card gets. Raises KernelError where it does not compile, with the compiler's first words."""
    try:
        from cuda.core import Program, ProgramOptions
    except Exception as error:
        raise _missing(error) from None
    folder = sources / "gpu"
    log = io.StringIO()
    try:
        text = (folder / file).read_text(encoding="utf-8")
        options = ProgramOptions(
            name=file,
            arch=arch,
            std="c++17",
            fma=False,  # The arithmetic contract: every operation rounds by itself.
            ptxas_options="-v",
            include_path=str(folder),
            device_as_default_execution_space=True,
            define_macro=("LOCALR1_ROWS_PER_BLOCK", str(rows_per_block)),
        )
        program = Program(text, "c++", options)
        cubin = bytes(program.compile("cubin", logs=log).code)
    except OSError as error:
        raise KernelError(f"GPU kernels: {file} cannot be read", found=str(error)) from None
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise KernelError(
            f"GPU kernels: {file} does not compile for {arch}",
            found="; ".join(lines[-2:]) or type(error).__name__,
            fix="The CPU computes instead; please report this.",
        ) from None
    return Compiled(cubin, log.getvalue())


class ProgramCache:
    """Cubins on disk, by the digest of all that decides them: sources, architecture, row blocks and
    version of the compiler.

    folder: made when first needed. progress: is told, in one line, when something is compiled. A
    file that is cut or damaged is made again; a disk that cannot be written costs the next start a
    few seconds, and is no error.
    """

    def __init__(
        self,
        folder: Path,
        sources: Path,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder, self._sources, self._progress = folder, sources, progress

    def get(self, file: str, arch: str, rows_per_block: int) -> bytes:
        """The cubin of sources/gpu/FILE. Raises KernelError as `compile_program`."""
        path = self.path(file, arch, rows_per_block)
        kept = _read_entry(path)
        if kept is not None:
            return kept
        self._progress(f"compiling {file} for {arch} (once for this card)")
        cubin = compile_program(self._sources, file, arch, rows_per_block).cubin
        try:
            _write_entry(path, cubin)
        except OSError as error:
            self._progress(f"the compiled kernels cannot be kept in {self._folder}: {error}")
        return cubin

    def path(self, file: str, arch: str, rows_per_block: int) -> Path:
        digest = hashlib.sha256()
        for name in (file, arch, str(rows_per_block), compiler_version()):
            digest.update(name.encode() + b"\0")
        headers = [*self._sources.glob("*.h"), *(self._sources / "gpu").glob("*.h")]
        for path in sorted([*headers, self._sources / "gpu" / file]):
            digest.update(path.name.encode() + b"\0")
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise KernelError(
                    f"GPU kernels: {path.name} cannot be read",
                    found=str(error),
                    fix="Install localr1 again.",
                ) from None
        return self._folder / f"{Path(file).stem}-{arch}-{digest.hexdigest()[:32]}.cubin"


def _read_entry(path: Path) -> bytes | None:
    """The cubin of an entry, or None where there is none or it is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    body = data[start:]
    whole = _MAGIC + hashlib.sha256(body).digest() + body
    return body if body and data == whole else None


def _write_entry(path: Path, cubin: bytes) -> None:
    """Under its name only when whole, so that a process beside this one never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".cubin-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(cubin).digest() + cubin)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _missing(error: Exception) -> KernelError:
    return KernelError(
        "GPU kernels cannot be compiled",
        expected="the packages cuda-core and nvidia-cuda-nvrtc",
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(
            ": "
        ),
        fix="Run `pip install 'localr1[gpu]'`.",
    )


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
