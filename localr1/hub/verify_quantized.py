"""Whether a quantized model is what `localr1 quantize` wrote: each file by its SHA-256, each expert
by its CRC-32C, every scale finite, no file of weights missing or too many."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.hf_directory import HuggingFaceDirectory
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.paths import model_root, quoted, resolve
from localr1.checkpoint.quality import CARD_NAME, read_card
from localr1.checkpoint.strict_json import expect, read_object, required
from localr1.errors import LocalR1Error, NotFoundError
from localr1.hub.describe import MAX_MANIFEST_BYTES
from localr1.hub.verify import (
    DAMAGED,
    EXTRA,
    MISSING,
    UNREADABLE,
    Expected,
    Finding,
    ProgressCallback,
    Verification,
    check_hashes,
)
from localr1.kernels.checksum import crc32c

READ_CHUNK: Final = 16 << 20
PACKED, SCALE = ".weight_packed", ".weight_scale"
_EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")
_EXPONENT: Final = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""Of a dtype its words, and the bits that are all set in NaN and Inf alone."""


@dataclass(frozen=True)
class _Range:
    """Bytes of a file, and the expert's number that they are; of scales None."""

    name: str
    path: Path
    offset: int
    nbytes: int
    expert: int | None = None
    dtype: str = ""


def verify_quantized(folder: Path, progress: ProgressCallback) -> Verification:
    """Reads every file once as a whole, and what it holds a second time, which is mostly still in
    memory then. Raises FormatError where localr1.json itself cannot be read."""
    root = model_root(folder)
    manifest = folder / MANIFEST_NAME
    document = read_object(
        resolve(root, MANIFEST_NAME), str(manifest), max_bytes=MAX_MANIFEST_BYTES
    )
    expected = _recorded_files(document, str(manifest))
    paths: dict[str, Path] = {}
    findings = []
    for name in expected:
        try:
            paths[name] = resolve(root, name)
        except NotFoundError:
            findings.append(Finding(MISSING, name, "it is not there"))
    findings += [
        Finding(EXTRA, path.name, f"{MANIFEST_NAME} does not have it: delete it")
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in expected
    ]
    checked = check_hashes(paths, expected, partial(_half, progress, 0), findings)
    if checked.findings:
        return checked  # What an open would say is the same, less clearly.
    inside = [*_contents(folder, partial(_half, progress, 1)), *_card(root, folder)]
    return replace(checked, findings=tuple(inside))


def _half(progress: ProgressCallback, half: int, done: int, total: int, name: str) -> None:
    """Of two passes through the same bytes, as one."""
    progress(half * total + done, 2 * total, name)


def _recorded_files(document: Mapping[str, Any], shown: str) -> dict[str, Expected | None]:
    found: dict[str, Expected | None] = {}
    for entry in required(document, "files", list, shown):
        record = expect(entry, dict, f"{shown}: files")
        where = f"{shown}: files: {quoted(record.get('name'))}"
        found[required(record, "name", str, where)] = Expected(
            required(record, "sha256", str, where), required(record, "bytes", int, where)
        )
    return found


def _card(root: Path, folder: Path) -> Iterator[Finding]:
    """The quality card is made after the checkpoint, which records no hash of it."""
    try:
        read_card(root, folder)
    except LocalR1Error as error:
        yield Finding(DAMAGED, CARD_NAME, str(error))


def _contents(folder: Path, progress: ProgressCallback) -> Iterator[Finding]:
    """What is wrong inside files that are as they were written."""
    try:
        checkpoint = HuggingFaceDirectory(folder)
    except LocalR1Error as error:
        yield Finding(UNREADABLE, folder.name, str(error))
        return
    try:
        checksums = checkpoint.expert_checksums()
        ranges = list(_ranges(checkpoint, checksums))
        total, done = sum(each.nbytes for each in ranges), 0
        files = {path: RandomAccessFile(path) for path in {each.path for each in ranges}}
        try:
            for each in ranges:
                progress(done, total, each.name)
                if (finding := _check(each, files[each.path], checksums)) is not None:
                    yield finding
                done += each.nbytes
        finally:
            for file in files.values():
                file.close()
    except LocalR1Error as error:
        yield Finding(UNREADABLE, MANIFEST_NAME, str(error))
    finally:
        checkpoint.close()


def _ranges(
    checkpoint: HuggingFaceDirectory, checksums: Mapping[str, tuple[int, ...]]
) -> Iterator[_Range]:
    """Of each expert with a checksum its codes and scales, which lie together; and all scales."""
    experts: dict[tuple[str, int], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(SCALE):
            found = checkpoint.location(name)
            yield _Range(name, found.path, found.offset, found.nbytes, dtype=info.dtype)
        match = _EXPERT.search(name)
        if match and name.endswith((PACKED, SCALE)):
            file_name = checkpoint.location(name).file_name
            if file_name in checksums:
                experts.setdefault((file_name, int(match[1])), []).append(name)
    for (file_name, number), names in experts.items():
        parts = [checkpoint.location(name) for name in names]
        begin, end = min(part.offset for part in parts), max(part.end for part in parts)
        yield _Range(file_name, parts[0].path, begin, end - begin, expert=number)


def _check(
    each: _Range, file: RandomAccessFile, checksums: Mapping[str, tuple[int, ...]]
) -> Finding | None:
    if each.expert is None:
        return None if _is_finite(each, file) else Finding(DAMAGED, each.name, "NaN or Inf")
    recorded = checksums[each.name]
    if each.expert >= len(recorded):
        return Finding(DAMAGED, each.name, f"no checksum of expert {each.expert} is recorded")
    value = 0
    for start in range(0, each.nbytes, READ_CHUNK):
        length = min(READ_CHUNK, each.nbytes - start)
        value = crc32c(file.read(each.offset + start, length), value)
    if value == recorded[each.expert]:
        return None
    detail = f"expert {each.expert}: checksum {value:08x}, not {recorded[each.expert]:08x}"
    return Finding(DAMAGED, each.name, detail)


def _is_finite(each: _Range, file: RandomAccessFile) -> bool:
    if each.dtype not in _EXPONENT:
        return True  # Opening the model refuses it.
    words, mask = _EXPONENT[each.dtype]
    for start in range(0, each.nbytes, READ_CHUNK):
        length = min(READ_CHUNK, each.nbytes - start)
        values = np.frombuffer(file.read(each.offset + start, length), dtype=words)
        if bool(np.any((values & mask) == mask)):
            return False
    return True
