"""Random values in the form in which they are stored: no float matrix is made on the way.

Every tensor has a stream of random numbers of its own, seeded by its name, so that its bytes do not
depend on what else is written. Widths of the values are such that what flows through the model
stays of order one: a random matrix keeps the size of its input, and the blocks add to the residual
stream no more in all than the embedding brought.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from geometry_sizes import Stream
from numpy.typing import NDArray
from torch import Tensor

from localr1.models.config import ModelConfig
from localr1.qtypes import QuantScheme

TOPICS: Final = 64
ROWS_AT_ONCE: Final = 4096
"""Of a table's rows in float32 at one time."""
ADDED_VARIANCE: Final = 0.5
"""Of all blocks together to the residual stream, whose embedding has 1."""
PEAKED: Final = 2.0
"""Deviation of attention's scores: a token then attends to some of those before it."""
SCALE_STEPS: Final = 16
"""A group's scale is 1 + n / 16 of the matrix's least, n from 0 to 15. With that rounded to three
bits, bfloat16 holds every scale exactly, and so does float16 from 2^-14 up: both sides of a
comparison compute the same model."""

# Bytes to codes that are zero on average: the lowest code, which has no counterpart, becomes 0.
_NIBBLES: Final = np.array([8, *range(1, 16)], dtype=np.uint8)
_BYTES: Final = {
    4: np.array([_NIBBLES[b & 15] | _NIBBLES[b >> 4] << 4 for b in range(256)], dtype=np.uint8),
    8: np.array([128, *range(1, 256)], dtype=np.uint8),
}
_DEVIATION: Final = {
    4: math.sqrt(2 * sum(n * n for n in range(1, 8)) / 16),
    8: math.sqrt(2 * sum(n * n for n in range(1, 128)) / 256),
}

Array = NDArray[Any]


def topic_of(token: int | Tensor) -> Any:
    """Neighbours differ, so that a prompt of bytes has many topics."""
    return token % TOPICS


@dataclass(frozen=True)
class RandomValues:
    """silent: tokens that the head never prefers (those that would end a reply)."""

    config: ModelConfig
    stream: Stream
    seed: int
    silent: tuple[int, ...]

    def packed(self, name: str, rows: int, columns: int, bits: int) -> Tensor:
        """weight_packed, int32 [rows, columns * bits / 32]."""
        raw = self._random(name).random_raw(rows * columns * bits // 64)
        codes = _BYTES[bits][raw.view(np.uint8)]
        return torch.from_numpy(codes.view(np.int32).reshape(rows, -1))

    def scale(
        self, name: str, rows: int, columns: int, scheme: QuantScheme, dtype: torch.dtype
    ) -> Tensor:
        """weight_scale [rows, columns / group]."""
        groups = columns // scheme.group_size
        raw = self._random(f"{name} scale").random_raw(-(-rows * groups // 8))
        steps = raw.view(np.uint8)[: rows * groups].reshape(rows, groups) % SCALE_STEPS
        wanted = self._gain(name) / (_DEVIATION[scheme.bits] * math.sqrt(columns))
        mantissa, exponent = math.frexp(wanted / 1.5)
        base = math.ldexp(round(mantissa * 8) / 8, exponent)
        factors = torch.from_numpy(steps.astype(np.float32)) / SCALE_STEPS + 1.0
        return (factors * base).to(dtype)

    def kept(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that is stored as floats: norms, routers, the embedding, kv_b."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        if name.endswith("e_score_correction_bias"):
            return (self._normal(name, shape) * 0.01).to(dtype)
        if name == "model.embed_tokens.weight":
            value = torch.empty(shape, dtype=dtype)
            for begin in range(0, shape[0], ROWS_AT_ONCE):
                end = min(begin + ROWS_AT_ONCE, shape[0])
                value[begin:end] = self._embedding(begin, end).to(dtype)
            return value
        return (self._normal(name, shape) * (self._gain(name) / math.sqrt(shape[-1]))).to(dtype)

    def head(self, begin: int, end: int) -> Tensor:
        """Rows of the head, float32 [end - begin, hidden]: of a token its topic's direction and
        directions of its own, all at a right angle to what every token has in common, which would
        make the same token the most probable one for good. Logits have a deviation of about 1."""
        rows = self._normal(f"head {begin}", (end - begin, self.config.hidden_size))
        topics = self._directions("topics", TOPICS)
        # What keeps a sampled token within the topic with probability 1 - 1 / topic_tokens.
        pull = math.log((self.stream.topic_tokens - 1.0) * (TOPICS - 1))
        # The final norm leaves a stream of variance 1, of which the topic is this much.
        share = self.stream.topic / (1.0 + ADDED_VARIANCE)
        rows += topics[topic_of(torch.arange(begin, end))] * (
            pull / math.sqrt(self.config.hidden_size * share)
        )
        common = self._directions("common", 1)
        rows -= (rows @ common.T) * common / self.config.hidden_size
        for token in self.silent:
            if begin <= token < end:
                rows[token - begin] = 0.0
        return rows / math.sqrt(self.config.hidden_size)

    def _embedding(self, begin: int, end: int) -> Tensor:
        """float32 [end - begin, hidden], rows of variance 1."""
        stream = self.stream
        own = math.sqrt(1.0 - stream.common - stream.topic)
        rows = self._normal(f"embedding {begin}", (end - begin, self.config.hidden_size)) * own
        rows += self._directions("common", 1) * math.sqrt(stream.common)
        topics = self._directions("topics", TOPICS) * math.sqrt(stream.topic)
        return rows + topics[topic_of(torch.arange(begin, end))]

    def _gain(self, name: str) -> float:
        """Deviation of a matrix's outputs for inputs of deviation 1."""
        if name.endswith(("o_proj", "down_proj")):
            # Of a gated MLP about a third of the variance is left by silu(gate) * up.
            return math.sqrt(ADDED_VARIANCE / (2 * self.config.num_layers)) * 2.0
        if name.endswith(("q_proj", "q_b_proj")):
            return PEAKED
        return 1.0

    def _directions(self, name: str, count: int) -> Tensor:
        """float32 [count, hidden] of deviation 1."""
        return self._normal(name, (count, self.config.hidden_size))

    def _normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = np.random.Generator(self._random(name))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def _random(self, name: str) -> np.random.SFC64:
        return np.random.SFC64([self.seed, zlib.crc32(name.encode())])
