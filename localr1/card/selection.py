"""The few tokens that the host draws from, found on the card among a token's logits."""

from ctypes import c_int32
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from localr1.candidates import AllLogits, Candidates, Sought
from localr1.card.program import Program, pointer
from localr1.kernels import gpu_launch

CAPACITY: Final = 2048
"""Candidates that there is room for, 16 KB of a copy: at R1's temperature of 0.6 a tenth of that
come but rarely (docs/gpu.md)."""
WORD: Final = 4
"""Bytes of all that the kernels find."""


@dataclass(frozen=True)
class Selection:
    """Of one vocabulary, what cuda/gpu/sampling.cu finds, in one piece: largest float32, counts
    int32, rests float32 [blocks], ids int32, logits float32 [capacity]. vocabulary: 0 for none."""

    vocabulary: int

    @property
    def capacity(self) -> int:
        return min(CAPACITY, self.vocabulary)

    @property
    def blocks(self) -> int:
        return gpu_launch.sampling_blocks(self.vocabulary)

    @property
    def words(self) -> int:
        return 3 * self.blocks + 2 * self.capacity

    @property
    def nbytes(self) -> int:
        return WORD * self.words

    def find(self, program: Program, logits: int, sought: int, found: int) -> None:
        """Addresses on the card: logits float32 [vocabulary], sought float32 [2] (depth, inverse
        temperature), found: `nbytes` bytes that are written."""
        largest, counts = found, found + WORD * self.blocks
        rests = counts + WORD * self.blocks
        ids = rests + WORD * self.blocks
        read = pointer(logits), c_int32(self.vocabulary)
        program.launch(gpu_launch.largest_logits(self.vocabulary), *read, pointer(largest))
        program.launch(
            gpu_launch.weigh_logits(self.vocabulary),
            *read, pointer(largest), pointer(sought), pointer(counts), pointer(rests),
        )  # fmt: skip
        program.launch(
            gpu_launch.gather_candidates(self.vocabulary),
            *read, pointer(largest), pointer(sought), pointer(counts), c_int32(self.capacity),
            pointer(ids), pointer(ids + WORD * self.capacity),
        )  # fmt: skip

    def read(
        self, words: NDArray[np.int32], sought: Sought, all_logits: AllLogits
    ) -> Candidates | None:
        """words: int32 [self.words], a copy of what `find` wrote. None where a logit is not finite,
        or there are too many candidates."""
        largest, counts, rests = words[: 3 * self.blocks].reshape(3, self.blocks)
        top, count = largest.view(np.float32).max(), int(counts.sum())
        if not np.isfinite(top) or count > self.capacity:
            return None
        ids, logits = words[3 * self.blocks :].reshape(2, self.capacity)[:, :count]
        return Candidates(
            ids=ids.astype(np.int64),
            logits=logits.view(np.float32).copy(),
            floor=top - np.float32(sought.depth),
            rest=float(rests.view(np.float32).sum(dtype=np.float64)),
            num_rest=self.vocabulary - count,
            all_logits=all_logits,
        )
