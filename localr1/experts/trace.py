"""A routing trace: which experts every token chose, as a file.

The file is a safetensors file (docs/trace.md):

    experts    U8 or U16 [tokens, layers, experts per token]  in the router's order, best first
    sequences  I32 [sequences, 2]                             tokens of the prompt, tokens generated

Tokens stand in the order in which the model read them, one sequence after another. Metadata:
`format` "localr1-trace", `version` "1", `model`, `num_experts`, `layers`, the model's numbers of
the mixture layers, and where it is known `sampling`, how the answers were drawn. At R1's size a
token takes 464 bytes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from localr1.checkpoint.paths import quoted
from localr1.checkpoint.strict_json import parse_json
from localr1.errors import FormatError, OutputError, UnsupportedError

if TYPE_CHECKING:
    from localr1.checkpoint.safetensors_file import SafetensorsFile

FORMAT, VERSION = "localr1-trace", "1"
MAX_EXPERTS = 1 << 16
EXPERT_TYPES = ("U8", "U16")


Choices = NDArray[np.integer[Any]]
"""Experts' numbers, uint8 or uint16."""


@dataclass(frozen=True)
class Trace:
    """experts: uint8 or uint16 [tokens, layers, k]. sequences: int32 [n, 2], prompt and generated
    tokens of each. layers: the model's numbers of its mixture layers. model: its name. sampling:
    the parameters that the answers were drawn with, by the names of SamplingParams; empty where
    nobody said."""

    experts: Choices
    sequences: NDArray[np.int32]
    layers: tuple[int, ...]
    num_experts: int
    model: str
    sampling: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    @property
    def experts_per_token(self) -> int:
        return int(self.experts.shape[2])


def expert_type(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest type that holds an expert's number."""
    assert 0 < num_experts <= MAX_EXPERTS
    return np.uint8 if num_experts <= 256 else np.uint16


def write_trace(trace: Trace, path: Path) -> None:
    """Write `path`, replacing a file of that name only when all is written. Raises OutputError."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "num_experts": str(trace.num_experts),
        "layers": ",".join(map(str, trace.layers)),
    }
    if trace.sampling:
        metadata["sampling"] = json.dumps(dict(trace.sampling))
    data = save({"experts": trace.experts, "sequences": trace.sequences}, metadata=metadata)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written", found=error.strerror) from error


def read_trace(path: Path) -> Trace:
    """Raises NotFoundError, FormatError, TruncatedError, TensorError and UnsupportedError: a trace
    is as little trusted as a checkpoint."""
    # It imports torch, which what a trace is looked at with does not need.
    from localr1.checkpoint.safetensors_file import SafetensorsFile

    file = SafetensorsFile(path)
    try:
        num_experts, layers, model = _read_metadata(file.metadata, path)
        sampling = _read_sampling(file.metadata.get("sampling"), f"{path}: sampling")
        _check_tensors(file, len(layers), path)
        experts = file.read("experts").numpy()
        sequences = file.read("sequences").numpy()
    finally:
        file.close()
    if experts.size and int(experts.max()) >= num_experts:
        raise FormatError(
            f"{path}: experts", expected=f"numbers below {num_experts}", found=int(experts.max())
        )
    if (sequences < 0).any() or int(sequences.sum(dtype=np.int64)) != len(experts):
        raise FormatError(
            f"{path}: sequences",
            expected=f"lengths that add up to {len(experts)} tokens",
            found=int(sequences.sum(dtype=np.int64)),
        )
    return Trace(experts, sequences, layers, num_experts, model, sampling)


def _read_metadata(metadata: Mapping[str, str], path: Path) -> tuple[int, tuple[int, ...], str]:
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{path}: metadata",
            expected=f"format {FORMAT!r}",
            found=quoted(metadata.get("format")),
            fix="Record one with `localr1 trace MODEL --prompts FILE --out TRACE`.",
        )
    if metadata.get("version") != VERSION:
        raise UnsupportedError(
            f"{path}: version", expected=VERSION, found=quoted(metadata.get("version"))
        )
    num_experts = _number(metadata.get("num_experts", ""), f"{path}: num_experts")
    if not 0 < num_experts <= MAX_EXPERTS:
        raise FormatError(f"{path}: num_experts", expected=f"1 to {MAX_EXPERTS}", found=num_experts)
    layers = tuple(
        _number(text, f"{path}: layers") for text in metadata.get("layers", "").split(",")
    )
    return num_experts, layers, metadata.get("model", "")


def _read_sampling(text: str | None, where: str) -> dict[str, int | float]:
    if text is None:  # As in all files from before it was recorded.
        return {}
    found = parse_json(text.encode(), where)
    if not isinstance(found, dict) or not all(
        type(value) in (int, float) for value in found.values()
    ):
        raise FormatError(where, expected="a JSON object of numbers", found=quoted(text))
    return found


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise FormatError(where, expected="a whole number", found=quoted(text))
    return int(text)


def _check_tensors(file: "SafetensorsFile", num_layers: int, path: Path) -> None:
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    experts, sequences = found.get("experts", ("", ())), found.get("sequences", ("", ()))
    if experts[0] not in EXPERT_TYPES or len(experts[1]) != 3 or experts[1][1] != num_layers:
        raise FormatError(
            f"{path}: experts",
            expected=f"{' or '.join(EXPERT_TYPES)} [tokens, {num_layers}, experts per token]",
            found=f"{experts[0]} {list(experts[1])}",
        )
    if sequences[0] != "I32" or len(sequences[1]) != 2 or sequences[1][1] != 2:
        raise FormatError(
            f"{path}: sequences",
            expected="I32 [sequences, 2]",
            found=f"{sequences[0]} {list(sequences[1])}",
        )
