"""Runs the kernels of cuda/gpu on the CPU: builds a source against tests/cuda_model, keeps buffers
between forbidden pages, and launches through ctypes.

A build is kept under build/cuda_model by the digest of all it was made from, so that only a changed
kernel is built again.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localr1.kernels.gpu_launch import Launch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "cuda" / "gpu"
MODEL = Path(__file__).resolve().parent / "cuda_model"
BUILDS = ROOT / "build" / "cuda_model"

SEEDS = (0, 1, 2)
"""Orders of warps and lanes: from the first on, from the last, and at random (cuda_model.h)."""

PAGE = mmap.PAGESIZE
SENTINEL = 0xA5


class ModelError(Exception):
    """A launch did what a kernel must not do."""


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def skip_where_there_is_no_model() -> None:
    if sys.platform != "linux":
        pytest.skip("the CUDA model needs Linux: its fibers are ucontext's, its pages mprotect's")
    if find_compiler() is None:
        pytest.skip("the CUDA model needs g++ or clang++")


def kernel_names(source: str) -> list[str]:
    """Of all kernels of a file, those made by a macro too."""
    names = re.findall(r"LOCALR1_KERNEL\(\w+, \w+\)\s+(\w+)\(", source)
    for macro, parameters, body in re.findall(
        r"#define (LOCALR1_\w+)\(([\w, ]+)\)((?:.*\\\n)+.*\n)", source
    ):
        patterns = re.findall(r"LOCALR1_KERNEL\([^\\]+\)[\s\\]+([\w#]+)\(", body)
        for call in re.findall(rf"^{macro}\(([\w, ]+)\)$", source, flags=re.MULTILINE):
            values = dict(zip(parameters.split(", "), call.split(", "), strict=True))
            for pattern in patterns:
                names.append("".join(values.get(part, part) for part in pattern.split("##")))
    return names


Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Program:
    """A file of cuda/gpu. rows: of a row block. changes: (text, replacement) pairs that plant
    errors in the source or in a header beside it; each text must be there. text: of the file, where
    it is none of cuda/gpu's but a test's."""

    file: str
    rows: int = 16
    changes: Changes = ()
    text: str = ""


def _texts(program: Program) -> dict[str, str]:
    """All sources a program is built from, under their path in cuda/, with the changes made."""
    paths = [*KERNELS.glob("*.h"), *(ROOT / "cuda").glob("*.h")]
    if not program.text:
        paths.append(KERNELS / program.file)
    texts = {str(p.relative_to(ROOT / "cuda")): p.read_text(encoding="utf-8") for p in paths}
    texts.setdefault(f"gpu/{program.file}", program.text)
    for old, new in program.changes:
        places = [name for name, text in texts.items() if old in text]
        assert places, f"nothing to change: {old}"
        texts[places[0]] = texts[places[0]].replace(old, new, 1)
    return texts


@functools.cache
def build(program: Program) -> ctypes.CDLL:
    """The library of a program. A source that does not compile fails the test with the reason."""
    texts = _texts(program)
    model = {path.name: path.read_text(encoding="utf-8") for path in MODEL.glob("*.h")}
    compiler = find_compiler()
    assert compiler is not None
    # Contraction off, as on the GPU; bad alignment and bad indices of arrays end the launch. What
    # is built for a single test is not worth optimizing.
    level = "-O0" if program.changes or program.text else "-O1"
    options = [
        "-std=c++17", level, "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing",
        "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-fcf-protection=none", "-Wall",
        "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
        "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
        f"-DLOCALR1_ROWS_PER_BLOCK={program.rows}",
    ]  # fmt: skip
    names = kernel_names(texts[f"gpu/{program.file}"])
    entries = ", ".join(f'entry<localr1::{name}>("{name}")' for name in names)
    main = (
        f'#include "cuda_model.h"\n#include "gpu/{program.file}"\nnamespace cuda_model {{\n'
        f'static const Entry entries[] = {{{entries}}};\n}}\n#include "launch.h"\n'
    )
    everything = repr((sorted(texts.items()), sorted(model.items()), main, options, compiler))
    digest = hashlib.sha256(everything.encode()).hexdigest()[:20]
    library = BUILDS / f"{digest}.so"
    if not library.exists():
        folder = BUILDS / f"{digest}.{os.getpid()}"
        for name, text in {**texts, **model, "main.cpp": main}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = [compiler, *options, "main.cpp", "-o", "library.so"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        os.replace(folder / "library.so", library)
        shutil.rmtree(folder)
    loaded = ctypes.CDLL(str(library))
    loaded.model_argument_bytes.restype = ctypes.c_size_t
    loaded.model_message.restype = ctypes.c_char_p
    loaded.model_fault.restype = ctypes.c_uint64
    return loaded


@dataclass(eq=False)
class Buffer:
    """Memory of the model's GPU, between two pages that nobody may touch. at_end: it ends where the
    second begins, else it begins where the first ends; the rest of its pages is watched."""

    name: str
    address: int
    nbytes: int
    pages: mmap.mmap = field(repr=False)
    begin: int  # within the pages

    def bytes_of_pages(self) -> bytes:
        return self.pages[PAGE:-PAGE]

    def check(self) -> None:
        around = self.bytes_of_pages()
        first = self.begin - PAGE
        for part, where in ((around[:first], "before"), (around[first + self.nbytes :], "behind")):
            if part.strip(bytes([SENTINEL])):
                raise ModelError(
                    f"{self.name}: something was written {where} its {self.nbytes} bytes"
                )


class Memory:
    """The buffers of one test; `upload` copies a tensor in, `download` a copy of it out."""

    ALIGNMENT = 16  # the widest load of a kernel; a GPU's own allocations are aligned to 256

    def __init__(self, *, at_end: bool = True) -> None:
        self.buffers: list[Buffer] = []
        self._at_end = at_end
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect

    def upload(self, name: str, value: Tensor) -> Buffer:
        data = value.contiguous().flatten().view(torch.uint8)
        nbytes = data.numel()
        inner = max(1, -(-nbytes // PAGE)) * PAGE
        pages = mmap.mmap(-1, inner + 2 * PAGE)
        anchor = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        pages[PAGE:-PAGE] = bytes([SENTINEL]) * inner
        begin = PAGE
        if self._at_end:
            begin += (inner - nbytes) // self.ALIGNMENT * self.ALIGNMENT
        ctypes.memmove(anchor + begin, data.data_ptr(), nbytes)
        for guard in (anchor, anchor + PAGE + inner):
            assert self._protect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
        buffer = Buffer(name, anchor + begin, nbytes, pages, begin)
        self.buffers.append(buffer)
        return buffer

    def download(self, buffer: Buffer, like: Tensor) -> Tensor:
        """As many bytes as `like` has, in its shape and dtype."""
        assert buffer.nbytes == like.nbytes
        raw = bytearray(ctypes.string_at(buffer.address, buffer.nbytes))
        if not raw:
            return like.clone()
        return torch.frombuffer(raw, dtype=torch.uint8).view(like.dtype).view(like.shape)

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        """Nobody may touch it meanwhile: it is another GPU's."""
        self._protect_all(0)
        try:
            yield
        finally:
            self._protect_all(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect_all(self, allowed: int) -> None:
        for buffer in self.buffers:
            first = buffer.address - buffer.begin + PAGE
            nbytes = len(buffer.pages) - 2 * PAGE
            result = self._protect(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), allowed)
            assert result == 0

    def describe(self, address: int) -> str:
        """Where an address lies, in words."""
        nearest = min(self.buffers, key=lambda b: abs(b.address + b.nbytes // 2 - address))
        offset = address - nearest.address
        if offset < 0:
            return f"{-offset} bytes before {nearest.name}"
        return f"byte {offset} of {nearest.name}, which has {nearest.nbytes}"

    def check(self) -> None:
        for buffer in self.buffers:
            buffer.check()


@dataclass(frozen=True)
class ModelGpu:
    """Launches kernels of the model; one order of warps and lanes."""

    memory: Memory
    seed: int

    def upload(self, name: str, value: Tensor) -> Any:
        return self.memory.upload(name, value)

    def download(self, buffer: Any, like: Tensor) -> Tensor:
        return self.memory.download(buffer, like)

    def address(self, buffer: Any) -> int:
        return int(buffer.address)

    def launch(
        self, launch: Launch, *arguments: object, rows: int = 16, changes: Changes = ()
    ) -> None:
        self.run(Program(launch.file, rows, changes), launch, *arguments)

    def run(self, program: Program, launch: Launch, *arguments: object) -> None:
        """arguments: buffers (None for a null pointer) and ctypes values. Raises ModelError for
        what the model found."""
        library, kernel = build(program), launch.kernel
        values = [as_ctypes(argument) for argument in arguments]
        for index, value in enumerate([*values, None]):
            expected = library.model_argument_bytes(kernel.encode(), ctypes.c_size_t(index))
            found = 0 if value is None else ctypes.sizeof(value)
            assert expected == found, f"{kernel}: argument {index}: {expected} bytes, found {found}"
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [*launch.grid, 1, 1][:3]
        failed = library.model_launch(
            kernel.encode(),
            (ctypes.c_uint * 3)(*sizes),
            (ctypes.c_uint * 3)(launch.threads, 1, 1),
            addresses,
            ctypes.c_uint64(self.seed),
        )
        if failed:
            message = library.model_message().decode()
            if library.model_fault():
                message += f": {self.memory.describe(library.model_fault())}"
            raise ModelError(f"{kernel}: {message}")
        self.memory.check()


def as_ctypes(argument: object) -> Any:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Buffer):
        return ctypes.c_void_p(argument.address)
    assert isinstance(argument, (ctypes._SimpleCData, ctypes.Structure)), argument
    return argument
