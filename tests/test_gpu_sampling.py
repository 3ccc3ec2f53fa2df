"""The most probable token, chosen on a GPU, is the one that the host would choose."""

import numpy as np
import pytest
import torch
from gpu_cases import Gpu, Gpus, i32, models
from gpu_model import Changes, ModelError
from torch import Tensor

from localr1.kernels import gpu_launch

NAN, INF = float("nan"), float("inf")


def chosen(gpu: Gpu, logits: Tensor, changes: Changes = ()) -> int:
    token = torch.tensor([77], dtype=torch.int32)
    buffer = gpu.upload("token", token)
    gpu.launch(
        gpu_launch.greedy(),
        gpu.upload("logits", logits), i32(len(logits)), buffer, changes=changes,
    )  # fmt: skip
    return int(gpu.download(buffer, token))


def rounded(size: int, seed: int) -> Tensor:
    """Of so few values that many are equal, the largest among them."""
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(size, generator=generator)).round().clamp(-6, 6)


@pytest.mark.parametrize("size", [1, 2, 31, 33, 1000, 1023, 1024, 1025, 4099, 20011])
def test_it_is_the_first_of_the_largest(size: int, gpus: Gpus) -> None:
    for gpu in gpus():
        for seed in range(4):
            logits = rounded(size, seed)
            assert chosen(gpu, logits) == int(logits.numpy().argmax())
        one_by_one = torch.randn(size, generator=torch.Generator().manual_seed(size))
        assert chosen(gpu, one_by_one) == int(one_by_one.numpy().argmax())


def test_values_at_the_edges(gpus: Gpus) -> None:
    """Zeros of both signs are equal, as numpy has it; the least number is one."""
    least, largest = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
    cases = ([-0.0, 0.0], [0.0, -0.0], [least, least], [-1.0, largest, largest], [1e-45, 0.0])
    for gpu in gpus():
        for values in cases:
            logits = torch.tensor(values).repeat(700)
            assert chosen(gpu, logits) == int(logits.numpy().argmax()), values


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 500, 1023, 1024, 2999])
def test_what_is_no_number_is_told(value: float, place: int, gpus: Gpus) -> None:
    for gpu in gpus():
        logits = rounded(3000, 1)
        logits[place] = value
        assert chosen(gpu, logits) == -1
        logits[(place + 7) % 3000] = INF
        assert chosen(gpu, logits) == -1


PLANTED = {
    "the last of equals": ("a.index < b.index", "a.index > b.index"),
    "one warp alone": ("Token{values[lane], indices[lane]}", "Token{values[0], indices[0]}"),
    "lanes keep to themselves": ("    if (comes_before(other, first)) first = other;\n", ""),
    "one past the end": ("i < vocabulary", "i <= vocabulary"),
    "infinity counts": ("(bits_from_float(value) & 0x7f800000u) != 0x7f800000u", "value == value"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    """By a wrong token or by the model, for one order of warps at least."""
    caught = []
    for gpu in models():
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            logits = rounded(1500, seed) if seed % 2 else torch.randn(1500, generator=generator)
            wanted = int(logits.numpy().argmax())
            if name == "infinity counts":
                logits[3], wanted = INF, -1
            try:
                if chosen(gpu, logits, (PLANTED[name],)) != wanted:
                    caught.append("wrong token")
            except ModelError as error:
                caught.append(str(error))
    assert caught, f"nothing saw: {name}"
    if name == "one past the end":
        assert any("outside" in line for line in caught), caught
