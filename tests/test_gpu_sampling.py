"""The candidates that a GPU finds are the tokens within a depth of the largest logit, in ascending
order, and the others are weighed in a fixed order."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from gpu_cases import Gpu, Gpus, i32, models
from gpu_model import Changes, ModelError
from kernel_cases import assert_same_bits
from torch import Tensor

from localr1.kernels import gpu_launch
from localr1.kernels.rowwise import contract_exp

NAN, INF = float("nan"), float("inf")
LEAST, MOST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
UNTOUCHED = 77


class Found(NamedTuple):
    """largest, counts, rests [blocks]; ids, values [capacity], UNTOUCHED behind the candidates."""

    largest: Tensor
    counts: Tensor
    rests: Tensor
    ids: Tensor
    values: Tensor


def find(
    gpu: Gpu, logits: Tensor, depth: float, inverse: float, capacity: int, changes: Changes = ()
) -> Found:
    vocabulary, blocks = len(logits), gpu_launch.sampling_blocks(len(logits))
    floats = torch.full((blocks,), float(UNTOUCHED))
    result = Found(
        floats, floats.int(), floats.clone(), torch.full((capacity,), UNTOUCHED).int(),
        torch.full((capacity,), float(UNTOUCHED)),
    )  # fmt: skip
    buffers = Found(*map(gpu.upload, Found._fields, result))
    read = gpu.upload("logits", logits), i32(vocabulary)
    sought = gpu.upload("sought", torch.tensor([depth, inverse]))
    gpu.launch(gpu_launch.largest_logits(vocabulary), *read, buffers.largest, changes=changes)
    gpu.launch(
        gpu_launch.weigh_logits(vocabulary),
        *read, buffers.largest, sought, buffers.counts, buffers.rests, changes=changes,
    )  # fmt: skip
    gpu.launch(
        gpu_launch.gather_candidates(vocabulary),
        *read, buffers.largest, sought, buffers.counts, i32(capacity), buffers.ids,
        buffers.values, changes=changes,
    )  # fmt: skip
    return Found(*map(gpu.download, buffers, result))


def reference(logits: Tensor, depth: float, inverse: float, capacity: int) -> Found:
    """The same in plain torch, every rounding in its place."""
    top = logits.max()
    is_candidate = logits >= top - torch.tensor(depth)
    weights = contract_exp((logits - top) * torch.tensor(inverse)).masked_fill(is_candidate, 0.0)
    size = gpu_launch.SAMPLING_TOKENS
    padding = (0, -len(logits) % size)
    # [block, 4 of a thread, 8 warps, 32 lanes]; 0 adds nothing.
    parts = torch.nn.functional.pad(weights, padding).view(-1, 4, 8, 32)
    lanes = ((parts[:, 0] + parts[:, 1]) + parts[:, 2]) + parts[:, 3]
    while lanes.shape[2] > 1:
        half = lanes.shape[2] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    rests = lanes[:, 0, 0]
    for warp in range(1, 8):
        rests = rests + lanes[:, warp, 0]
    blocks = torch.nn.functional.pad(logits, padding, value=-INF).view(-1, size)
    counts = torch.nn.functional.pad(is_candidate, padding).view(-1, size).sum(1).int()
    ids = torch.full((capacity,), UNTOUCHED).int()
    values = torch.full((capacity,), float(UNTOUCHED))
    places = is_candidate.nonzero()[:capacity, 0]
    ids[: len(places)], values[: len(places)] = places.int(), logits[places]
    return Found(blocks.amax(1), counts, rests, ids, values)


def assert_found(gpu: Gpu, logits: Tensor, depth: float, inverse: float, capacity: int) -> None:
    found = find(gpu, logits, depth, inverse, capacity)
    for name, one, other in zip(
        Found._fields, found, reference(logits, depth, inverse, capacity), strict=True
    ):
        assert_same_bits(one, other, (name, len(logits), depth, capacity))


@pytest.mark.parametrize("size", [1, 2, 33, 1023, 1024, 1025, 4099, 20011])
def test_candidates_are_those_of_the_reference(size: int, gpus: Gpus) -> None:
    """Of few values, so that many are equal and at the floor, and of many; none but the largest,
    some, all of them, and more than there is room for."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(size, generator=generator)
    rounded = logits.round().clamp(-6, 6)
    for gpu in gpus():
        assert_found(gpu, logits, 0.0, 1.0, size)
        assert_found(gpu, logits, 6.0, 1 / 0.6, size)
        assert_found(gpu, rounded, 3.0, 0.7, max(1, size // 3))
        assert_found(gpu, rounded, 100.0, 1.0, size)


def test_values_at_the_edges(gpus: Gpus) -> None:
    """Zeros of both signs are equal, as numpy has it; the least and the largest numbers are some;
    what is far too deep weighs as little as there is."""
    cases = ([-0.0, 0.0], [LEAST, LEAST], [-1.0, MOST, LEAST], [1e-45, 0.0, -1e-45])
    for gpu in gpus():
        for values in cases:
            logits = torch.tensor(values).repeat(700)
            assert_found(gpu, logits, 0.0, 1.0, 5)
            assert_found(gpu, logits, 1.0, 1e20, 2000)


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 1023, 2048, 2999])
def test_what_is_no_number_is_told(value: float, place: int, gpus: Gpus) -> None:
    """The largest is infinite then, whatever else there is; nothing is written beside the rest."""
    for gpu in gpus():
        logits = torch.randn(3000, generator=torch.Generator().manual_seed(1))
        logits[place] = value
        assert find(gpu, logits, 1.0, 1.0, 50).largest.max() == INF
        logits[(place + 7) % 3000] = INF
        assert find(gpu, logits, 1.0, 1.0, 50).largest.max() == INF


PLANTED = {
    "one past the end": ("if (token >= vocabulary) break;", "if (token > vocabulary) break;"),
    "no barrier for what all have found": (
        "of_warps[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "of_warps[threadIdx.x / kWarp] = value;",
    ),
    "what is at the floor is left out": ("logit >= floor", "logit > floor"),
    "fused": (
        "rounded_product(rounded_difference(logit, top), inverse)",
        "__fmaf_rn(logit, inverse, -rounded_product(top, inverse))",
    ),
    "the last warp's are forgotten": (
        "warp < kSamplingWarps; ++warp) {\n    count",
        "warp < kSamplingWarps - 1; ++warp) {\n    count",
    ),
    "the order of blocks": ("block < int(blockIdx.x)", "block <= int(blockIdx.x)"),
    "the order of warps": ("if (other < warp) before", "if (other > warp) before"),
    "the order of lanes": ("int before = sum - count", "int before = sum"),
    "beyond the room": ("if (place < capacity)", "if (place <= capacity)"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    """By a wrong result or by the model, for one order of warps at least."""
    caught = []
    logits = 4 * torch.randn(3000, generator=torch.Generator().manual_seed(2))
    logits[7] = logits.max() - 8.0
    wanted = reference(logits, 8.0, 1.6, 40)
    for gpu in models():
        try:
            found = find(gpu, logits, 8.0, 1.6, 40, (PLANTED[name],))
        except ModelError as error:
            caught.append(str(error))
        else:
            if not all(map(torch.equal, found, wanted)):
                caught.append("wrong result")
    assert caught, f"nothing saw: {name}"
    if name == "beyond the room":
        assert any("outside" in line for line in caught), caught
