"""FP8 with a scale for each block: how such rows are handed to a kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockScaledRows:
    """Rows of a matrix of FP8 codes with a scale for each block of it (checkpoint/fp8.py).

    codes: float8_e4m3fn [rows, in]. scales: float32 [ceil(out/block[0]), ceil(in/block[1])], of the
    whole matrix. block: rows and columns. first_row: of the matrix, where the codes begin.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    first_row: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape
