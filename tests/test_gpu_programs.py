"""The GPU kernels compile for every architecture without spills; what is compiled is kept well."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from localr1.errors import KernelError
from localr1.kernels import gpu_program
from localr1.kernels.gpu_program import (
    PROGRAMS,
    ProgramCache,
    architecture,
    compile_program,
    installed_sources,
    kept_programs,
)
from localr1.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "cuda"

pytest.importorskip("cuda.core", reason="needs cuda-core")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_resources  # noqa: E402

# An SM has 65,536 registers: it holds at least 512 threads of a kernel that computes several
# tokens or heads at once, and 1024 of any other.
REGISTERS = 64
REGISTERS_OF_MANY = 128
SHARED_BYTES = 48 * 1024  # what every card gives without being asked


@pytest.fixture(scope="module", autouse=True)
def needs_nvrtc() -> None:
    try:
        gpu_program.compiler_version()
    except KernelError as error:
        pytest.skip(str(error))


def test_every_file_of_kernels_is_a_program() -> None:
    assert sorted(PROGRAMS) == sorted(path.name for path in (CUDA / "gpu").glob("*.cu"))


def test_no_kernel_includes_a_header_of_cuda() -> None:
    ours = {path.name for path in (*CUDA.glob("*.h"), *(CUDA / "gpu").glob("*.h"))}
    for path in (CUDA / "gpu").iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#include"):
                assert line.split('"')[1].rpartition("/")[2] in ours, f"{path.name}: {line}"


def test_every_kernel_compiles_without_spills_and_takes_what_the_table_says() -> None:
    """The table is scripts/gpu_resources.py's. Another NVRTC takes other registers: then only the
    limits are held."""
    table = gpu_resources.all_resources()
    for (kernel, rows), by_arch in table.items():
        many = re.search(r"_t[48]$|^attend_|^matmul_|_tiles_", kernel)
        limit = REGISTERS_OF_MANY if many else REGISTERS
        for arch, found in by_arch.items():
            case = f"{kernel} rows {rows} {arch}: {found}"
            assert found.spilled == found.stack == 0, case
            assert found.registers <= limit, case
            assert found.shared <= SHARED_BYTES, case
    kept = gpu_resources.TABLE.read_text(encoding="utf-8")
    if f"NVRTC {gpu_program.compiler_version()}." in kept:
        assert gpu_resources.render(table) == kept, "run scripts/gpu_resources.py"


def test_a_spill_is_seen_in_the_log() -> None:
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_75'\n"
        "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]\n"
    )
    assert gpu_resources.parse_log(log) == {"k": gpu_resources.Resources(255, 512, 16, 12)}


def ptx_of(text: bytes, arch: int = 75) -> str:
    """Through NVRTC itself, as cuda-core asks a driver before it makes PTX."""
    program = nvrtc.nvrtcCreateProgram(text, b"kernels.cu", 0, [], [])[1]
    options = [
        f"--gpu-architecture=compute_{arch}".encode(), b"--std=c++17",
        b"--device-as-default-execution-space", b"-DLOCALR1_ROWS_PER_BLOCK=16",
        f"--include-path={CUDA / 'gpu'}".encode(),
    ]  # fmt: skip
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    size = nvrtc.nvrtcGetPTXSize(program)[1]
    ptx = b" " * size  # written in place, as NVRTC's bindings want it
    nvrtc.nvrtcGetPTX(program, ptx)
    return str(ptx, "utf-8")


# Attention's own products are outside the contract; its norm and rope have roundings by name. Where
# a token is chosen nothing is multiplied.
@pytest.mark.parametrize("file", sorted({*PROGRAMS} - {"attention.cu", "latent.cu", "sampling.cu"}))
def test_nothing_is_fused_under_the_contract(file: str) -> None:
    """Even without the option against contraction, as compiled here."""
    ptx = ptx_of((CUDA / "gpu" / file).read_bytes())
    assert "mul.rn.f32" in ptx
    assert "fma." not in ptx


@pytest.mark.parametrize("file", ["matmul.cu", "expert_tiles.cu"])
def test_tiles_are_computed_by_the_tensor_cores(file: str) -> None:
    """Turing's in smaller steps, and without asynchronous copies."""
    text = (CUDA / "gpu" / file).read_bytes()
    turing, ampere = ptx_of(text, 75), ptx_of(text, 80)
    assert "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32" in turing
    assert "m16n8k32" not in turing
    assert "cp.async" not in turing
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ampere
    assert "cp.async.cg.shared.global" in ampere


def test_a_fused_product_is_seen() -> None:
    kernel = (
        b'#include "device.h"\nLOCALR1_KERNEL(32, 512) k(float* x) { x[0] = x[1] * x[2] + x[3]; }'
    )
    assert "fma." in ptx_of(kernel)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of cuda/'s sources with one quick kernel."""
    folder = tmp_path / "sources"
    shutil.copytree(CUDA, folder, ignore=shutil.ignore_patterns("cpu", "*.cpp", "*.cu"))
    text = '#include "device.h"\nLOCALR1_KERNEL(32, 1024) k(float* x) { *x = __fsqrt_rn(*x); }\n'
    (folder / "gpu" / "quick.cu").write_text(text)
    return folder


def test_what_was_compiled_is_kept(sources: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = ProgramCache(tmp_path / "cache", sources, lines.append)
    first = cache.get("quick.cu", "sm_89", 16)
    assert first[:4] == b"\x7fELF"
    assert lines == ["compiling quick.cu for sm_89 (once for this card)"]
    assert cache.get("quick.cu", "sm_89", 16) == first
    again = ProgramCache(tmp_path / "cache", sources, lines.append)
    assert again.get("quick.cu", "sm_89", 16) == first
    assert len(lines) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cubin"]


def test_what_decides_a_cubin_decides_its_name(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ProgramCache(tmp_path, sources)
    seen = {cache.path("quick.cu", "sm_89", 16)}

    def new_name() -> bool:
        before = len(seen)
        seen.add(cache.path("quick.cu", "sm_89", 16))
        return len(seen) > before

    assert not new_name()
    seen |= {cache.path("quick.cu", "sm_86", 16), cache.path("quick.cu", "sm_89", 8)}
    assert len(seen) == 3
    for name in ("blocks.h", "gpu/device.h", "gpu/quick.cu"):
        with (sources / name).open("a") as file:
            file.write("// changed\n")
        assert new_name(), name
    monkeypatch.setattr(gpu_program, "compiler_version", lambda: "99.9")
    assert new_name()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer", "another file"])
def test_a_damaged_entry_is_made_again(damage: str, sources: Path, tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path / "cache", sources)
    good = cache.get("quick.cu", "sm_75", 16)
    path = cache.path("quick.cu", "sm_75", 16)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    changed: dict[str, bytes] = {
        "cut": bytes(data[:-7]),
        "empty": b"",
        "longer": bytes(data) + b"x",
        "another file": b"\x7fELF" * 9,
    }
    path.write_bytes(changed.get(damage, bytes(data)))
    assert cache.get("quick.cu", "sm_75", 16) == good
    assert path.read_bytes()[-len(good) :] == good


def test_a_cache_that_cannot_be_written_is_no_error(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    cache = ProgramCache(tmp_path / "file" / "cache", sources, lines.append)
    assert cache.get("quick.cu", "sm_75", 16)[:4] == b"\x7fELF"
    assert "cannot be kept" in lines[-1]


def test_a_full_disk_leaves_nothing_behind(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = ProgramCache(tmp_path / "cache", sources)
    assert cache.get("quick.cu", "sm_75", 16)[:4] == b"\x7fELF"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_that_does_not_compile_is_one_sentence(sources: Path, tmp_path: Path) -> None:
    (sources / "gpu" / "quick.cu").write_text("LOCALR1_KERNEL(32, 1024) k() { gone }\n")
    with pytest.raises(KernelError, match=r"quick.cu does not compile for sm_75: found .*error"):
        ProgramCache(tmp_path / "cache", sources).get("quick.cu", "sm_75", 16)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(KernelError, match=r"gone\.cu cannot be read"):
        compile_program(sources, "gone.cu", "sm_75", 16)
    with pytest.raises(KernelError, match=r"gone\.cu cannot be read"):
        ProgramCache(tmp_path / "cache", sources).get("gone.cu", "sm_75", 16)


def test_the_architecture_of_a_card() -> None:
    assert architecture(75) == "sm_75"
    assert architecture(89) == "sm_89"
    assert architecture(82) == "sm_80"  # newer cards of a generation run what older ones do
    with pytest.raises(KernelError, match=r"expected compute capability 7.5 or newer, found 6.1"):
        architecture(61)
    with pytest.raises(KernelError, match=r"found 99.0. Install a newer nvidia-cuda-nvrtc"):
        architecture(990)


def test_without_the_compiler_one_sentence_says_what_to_install(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for call in (
        lambda: compile_program(sources, "quick.cu", "sm_75", 16),
        lambda: architecture(89),
        gpu_program.compiler_version,
    ):
        with pytest.raises(
            KernelError, match=r"expected .*cuda-core.*pip install 'localr1\[gpu\]'"
        ):
            call()


def test_the_users_cache_lies_in_the_cache_folder(tmp_path: Path) -> None:
    settings = Settings.from_environment({"LOCALR1_HOME": str(tmp_path)})
    path = kept_programs(settings).path("matvec.cu", "sm_89", 8)
    assert path.parent == tmp_path / "cache" / "gpu"


def test_the_package_brings_the_sources() -> None:
    folder = installed_sources()
    for file in PROGRAMS:
        assert (folder / "gpu" / file).read_bytes() == (CUDA / "gpu" / file).read_bytes()
    assert (folder / "dequant.h").is_file()
