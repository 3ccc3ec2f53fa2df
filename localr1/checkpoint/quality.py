"""quality.json, the quality card in a quantized model's directory: how it compares with the source.

It holds times, so it is no part of localr1.json, which the same source and recipe always give byte
for byte; it has that file's SHA-256 instead, by which a card of another checkpoint is found out.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.files import read_bounded
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.paths import resolve
from localr1.checkpoint.strict_json import expect, read_object, required
from localr1.errors import FormatError

CARD_NAME: Final = "quality.json"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 << 20
FIX: Final = "Make it anew: localr1 eval card MODEL --reference SOURCE --write."

_NUMBERS: Final = ("perplexity_ratio", "kl_p99", "bits_per_weight")
_MEANS: Final = ("perplexity", "reference_perplexity", "kl", "top1")
_MAY_BE_UNKNOWN: Final = ("seconds", "peak_memory_bytes")


def manifest_sha256(root: Path) -> str:
    """Of the localr1.json in a directory. Raises NotFoundError without one."""
    path = resolve(root, MANIFEST_NAME)
    data = read_bounded(path, str(root / MANIFEST_NAME), MAX_MANIFEST_BYTES)
    return hashlib.sha256(data).hexdigest()


def read_card(root: Path, shown: Path) -> Mapping[str, Any] | None:
    """The card of the directory `root`, named `shown` in errors; None where there is none. Raises
    FormatError for what is no card, and for one of another checkpoint."""
    if not os.path.lexists(root / CARD_NAME):
        return None
    where = str(shown / CARD_NAME)
    card = read_object(resolve(root, CARD_NAME), where)
    if required(card, "version", int, where) != VERSION:
        raise FormatError(f"{where}: version", expected=VERSION, found=card["version"], fix=FIX)
    if required(card, "manifest_sha256", str, where) != manifest_sha256(root):
        raise FormatError(
            where,
            expected=f"a card of this checkpoint, by the SHA-256 of {MANIFEST_NAME}",
            found="one of another",
            fix=FIX,
        )
    for name in _NUMBERS:
        _number(card, name, where)
    for name in _MEANS:
        mean = required(card, name, dict, where)
        _number(mean, "value", f"{where}: {name}")
        if mean.get("standard_error") is not None:
            _number(mean, "standard_error", f"{where}: {name}")
    for name in _MAY_BE_UNKNOWN:
        if card.get(name) is not None:
            _number(card, name, where)
    required(card, "bytes", int, where)
    for group, keys in (("text", ("name", "sha256")), ("reference", ("name",))):
        named = required(card, group, dict, where)
        for key in keys:
            required(named, key, str, f"{where}: {group}")
    required(required(card, "text", dict, where), "positions", int, f"{where}: text")
    for layer in required(card, "layers", list, where):
        values = expect(layer, dict, f"{where}: layers")
        required(values, "layer", str, f"{where}: layers")
        _number(values, "relative_error", f"{where}: layers")
    return card


def _number(values: Mapping[str, Any], key: str, where: str) -> None:
    if type(values.get(key)) is not int:
        required(values, key, float, where)
