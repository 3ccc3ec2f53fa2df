"""What localr1.json, which the quantizer leaves beside its files, says to a reader of them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from localr1.checkpoint.paths import quoted, resolve
from localr1.checkpoint.strict_json import expect, optional, read_object
from localr1.errors import FormatError

MANIFEST_NAME = "localr1.json"
EXPERT_CHECKSUMS = "expert_checksums"
"""Name of an expert shard -> of each expert, by number, the CRC-32C (kernels/checksum.py) of its
range of bytes: packed gate, up, down, then their scales."""

_CHECKSUM = re.compile(r"[0-9a-f]{8}\Z")


def checksum_text(value: int) -> str:
    """As it is written: eight hexadecimal digits."""
    return f"{value:08x}"


def expert_checksums(root: Path, shown: Path) -> Mapping[str, tuple[int, ...]]:
    """Of the directory `root`, named `shown` in errors; {} where nothing is recorded: checkpoints
    of others, and our own up to version 0.1. Raises FormatError for what is no list of checksums.
    """
    if not os.path.lexists(root / MANIFEST_NAME):
        return {}
    where = str(shown / MANIFEST_NAME)
    document = read_object(resolve(root, MANIFEST_NAME), where)
    where = f"{where}: {EXPERT_CHECKSUMS}"
    recorded = optional(document, EXPERT_CHECKSUMS, dict, f"{shown / MANIFEST_NAME}") or {}
    return {
        name: tuple(
            _checksum(value, f"{where}: {quoted(name)}")
            for value in expect(values, list, f"{where}: {quoted(name)}")
        )
        for name, values in recorded.items()
    }


def _checksum(value: object, shown: str) -> int:
    if not isinstance(value, str) or not _CHECKSUM.match(value):
        raise FormatError(
            shown,
            expected="eight hexadecimal digits for each expert",
            found=quoted(value),
            fix=f"{MANIFEST_NAME} is damaged: download or quantize the model again.",
        )
    return int(value, 16)
