"""The quality card: what a quantized model is against the one it was made from, measured once.

Its fields and where it lies: localr1/checkpoint/quality.py.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

import localr1
from localr1.checkpoint.hf_directory import HuggingFaceDirectory
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.paths import model_root
from localr1.checkpoint.quality import CARD_NAME, VERSION, manifest_sha256
from localr1.checkpoint.strict_json import optional, read_object, required
from localr1.errors import NotFoundError, OutputError, UsageError
from localr1.models.config import LAYER_PREFIX
from localr1.quant.calibrate import DEFAULT_TEXT
from localr1.quant.documents import encode
from localr1.quant.evaluate import Divergence, read_text
from localr1.quant.experts import EXPERTS_PART

TELLING_LINE: Final = 40
"""Characters: a line so long that is in two texts was copied."""
SCALE: Final = ".weight_scale"


@dataclass(frozen=True)
class Cost:
    """Of the quantization itself: wall clock, and resident memory at most."""

    seconds: float
    peak_memory_bytes: int


def check_disjoint(text: str, folder: Path) -> None:
    """Raises UsageError for a text that the model in `folder` was fitted to: it would flatter."""
    document = _manifest(folder)
    if not any(document.get(key) for key in ("smoothed", "calibration", "target")):
        return
    fitted = {line for line in read_text(DEFAULT_TEXT).splitlines() if len(line) >= TELLING_LINE}
    shared = next((line for line in text.splitlines() if line in fitted), None)
    if shared is not None:
        raise UsageError(
            "the text to measure with",
            expected="none of what the model was calibrated on",
            found=f"a line of it: {shared[:TELLING_LINE]!r}...",
        )


def make_card(
    folder: Path,
    reference: Path,
    divergence: Divergence,
    text: str,
    text_name: str,
    window: int,
    cost: Cost | None = None,
) -> dict[str, Any]:
    """folder: what `localr1 quantize` wrote. divergence: of its model from the reference's on
    `text`. cost: None where the quantization was not watched. Raises NotFoundError for a directory
    without localr1.json."""
    root = model_root(folder)
    document = _manifest(folder)
    ratio = divergence.model.perplexity.value / divergence.reference.perplexity.value
    return {
        "version": VERSION,
        "made_by": {"localr1": localr1.__version__, "torch": str(torch.__version__)},
        "manifest_sha256": manifest_sha256(root),
        "reference": {"name": reference.name},
        "text": {
            "name": text_name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "window": window,
            "positions": divergence.num_positions,
        },
        "perplexity": asdict(divergence.model.perplexity),
        "reference_perplexity": asdict(divergence.reference.perplexity),
        "perplexity_ratio": ratio,
        "kl": asdict(divergence.kl),
        "kl_p99": divergence.kl_p99,
        "top1": asdict(divergence.top1),
        "bytes": sum(
            path.stat().st_size
            for path in root.iterdir()
            if path.is_file() and path.name != CARD_NAME
        ),
        "bits_per_weight": required(document, "bits_per_weight", float, MANIFEST_NAME),
        "layers": layer_errors(folder),
        "seconds": None if cost is None else round(cost.seconds, 3),
        "peak_memory_bytes": None if cost is None else cost.peak_memory_bytes,
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> Path:
    """Into `folder`, in the place of one that is there. Raises OutputError."""
    path = folder / CARD_NAME
    partial = folder / f".{CARD_NAME}.partial"
    try:
        with partial.open("wb") as file:
            file.write(encode(card))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written", found=error.strerror) from error
    return path


def layer_errors(folder: Path) -> list[dict[str, Any]]:
    """Of each layer, the embedding and the head, as far as they are quantized, the relative squared
    error of their weights: the mean over matrices by the number of their groups."""
    document = _manifest(folder)
    sums: dict[str, tuple[float, int]] = {}

    def add(name: str, error: float, groups: int) -> None:
        before, count = sums.get(name, (0.0, 0))
        sums[name] = before + error * groups, count + groups

    checkpoint = HuggingFaceDirectory(folder)
    try:
        for module, values in (optional(document, "tensors", dict, MANIFEST_NAME) or {}).items():
            scale = checkpoint.tensors[f"{module}{SCALE}"]
            add(_layer_of(module), values["relative_error"], math.prod(scale.shape))
        for values in optional(document, "experts", list, MANIFEST_NAME) or []:
            first = f"{values['layer']}{EXPERTS_PART}0.{values['matrix']}{SCALE}"
            size = math.prod(checkpoint.tensors[first].shape)
            add(_layer_of(values["layer"]), values["relative_error"], values["experts"] * size)
    finally:
        checkpoint.close()
    return [
        {"layer": name, "relative_error": error / count} for name, (error, count) in sums.items()
    ]


def _layer_of(module: str) -> str:
    """Its number, or the module's own name."""
    if not module.startswith(LAYER_PREFIX):
        return module.removeprefix("model.")
    return module.removeprefix(LAYER_PREFIX).partition(".")[0]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise NotFoundError(
            f"{folder}: there is no {MANIFEST_NAME}",
            expected="a model that `localr1 quantize` has made",
        )
    return read_object(path, str(path))
