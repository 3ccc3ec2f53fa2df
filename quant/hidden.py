"""What the text has become between two sections, as files beside an unfinished result."""

import hashlib

import torch
from torch import Tensor

from localr1.quant.atomic import AtomicDirectory

PREFIX = "hidden-"


class HiddenFiles:
    """`hidden-NNNNN.f32`: float32 values that section NNNNN left. Raises OutputError as the
    directory does, and for a file whose bytes are not those that were written."""

    def __init__(self, directory: AtomicDirectory) -> None:
        self._directory = directory

    def write(self, number: int, hidden: Tensor) -> str:
        """A new file; returns its SHA-256."""
        data = hidden.contiguous().numpy().data.cast("B")
        self._directory.write_path(self._directory.beside(_name(number)), data)
        return hashlib.sha256(data).hexdigest()

    def read(self, number: int, sha256: str) -> Tensor:
        """float32, flat."""
        name = _name(number)
        with self._directory.errors():
            data = bytearray(self._directory.beside(name).read_bytes())
        if hashlib.sha256(data).hexdigest() != sha256:
            raise self._directory.damaged(name)
        return torch.frombuffer(data, dtype=torch.float32)

    def remove(self, but: int) -> None:
        """All but one."""
        with self._directory.errors():
            for path in self._directory.beside("").iterdir():
                if path.name.startswith(PREFIX) and path.name != _name(but):
                    path.unlink()


def _name(number: int) -> str:
    return f"{PREFIX}{number:05d}.f32"
