"""How far a quantization is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """stage: "quantize" (bytes of the source's tensors), "hash source" or "verify" (bytes of
    files), "calibrate" (layers); they take turns, layer by layer, and each goes on where it was.
    name: the tensor or file at work."""

    stage: str
    done: int
    total: int
    name: str


ProgressCallback = Callable[[Progress], None]


def of_stage(
    stage: str, progress: ProgressCallback | None
) -> Callable[[int, int, str], None] | None:
    """Calls `progress` with what it is given: done, total and name."""
    if progress is None:
        return None
    return lambda done, total, name: progress(Progress(stage, done, total, name))


def byte_counter(
    stage: str, total: int, progress: ProgressCallback | None
) -> Callable[[int], None] | None:
    """A callback for bytes done, which adds up."""
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress(stage, done, total, ""))

    return count
