"""The state of a training run as one safetensors file: a format that holds tensors and no code."""

from collections import defaultdict
from pathlib import Path

from model import R1Nano
from optimizer import MixedPrecision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "state.safetensors"


def save_state(path: Path, step: int, model: R1Nano, optimizer: MixedPrecision) -> None:
    """Writes beside, then replaces: an interruption leaves the former file whole."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.state().items()}
    partial = path.with_suffix(".part")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, partial, {"step": str(step)})
    partial.replace(path)


def load_state(path: Path, model: R1Nano, optimizer: MixedPrecision) -> int:
    """Restores what `save_state` was given; returns the step."""
    step, parts = _read(path)
    model.load_state_dict(parts["model"])
    optimizer.restore(parts["optimizer"])
    return step


def load_model(path: Path) -> dict[str, Tensor]:
    """The model's tensors alone, by the names of its `state_dict`."""
    return _read(path)[1]["model"]


def _read(path: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            part, name = key.split("/", 1)
            parts[part][name] = file.get_tensor(key)
        return int(file.metadata()["step"]), dict(parts)
