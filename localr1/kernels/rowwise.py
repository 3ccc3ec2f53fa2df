"""Rows of float32 in plain torch, every rounding in its place (docs/arithmetic.md)."""

import torch
from torch import Tensor

LANES = 64
"""Partial sums of one sum over a row; element i is added to lane i mod 64."""

# exp(x) = 2^n * e^r, n = round(x * log2 e), r = (x - n * LN2_HIGH) - n * LN2_LOW. LN2_HIGH is
# 355/512, with 15 trailing zero bits, so n * LN2_HIGH is exact. e^r = 1 + (r + r^2 * p(r)), p of
# degree 5 fitted for the smallest largest relative error on |r| <= ln2/2. cuda/dequant.h has the
# same values.
EXP_LOW, EXP_HIGH = -87.0, 88.0
LOG2_E = 1.4426950216293335
LN2_HIGH = 0.693359375
LN2_LOW = -0.00021219444
EXP_COEFFICIENTS = (
    0.000197902977,
    0.00139447034,
    0.00833349768,
    0.0416662954,
    0.166666657,
    0.5,
)


def contract_exp(x: Tensor) -> Tensor:
    """exp of float32 x clamped to [-87, 88], within 2 units in the last place; NaN stays NaN."""
    x = x.clamp(EXP_LOW, EXP_HIGH)
    n = torch.round(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(x, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    exponent = torch.where(n.isnan(), 0.0, n).to(torch.int32)
    return p * ((exponent + 127) << 23).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) with the contract's exp."""
    # torch.div of two tensors: a Python number divided by a tensor is a reciprocal and a product.
    return torch.div(torch.tensor(1.0), 1.0 + contract_exp(-x))


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) with the contract's exp."""
    return x / (1.0 + contract_exp(-x))


def lane_dot(x: Tensor, weight: Tensor) -> Tensor:
    """Sums of x * weight over the last dimension (the others broadcast): each product rounded, then
    added to its lane, the lanes folded by halves."""
    padding = (0, -x.shape[-1] % LANES)
    x, weight = (torch.nn.functional.pad(each, padding) for each in (x, weight))
    lanes = torch.zeros(LANES)
    for first in range(0, x.shape[-1], LANES):
        lanes = lanes + x[..., first : first + LANES] * weight[..., first : first + LANES]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x * (1 / sqrt(mean(x^2) + eps))) * weight over the last dimension."""
    mean = lane_dot(x, x)[..., None] / float(x.shape[-1])
    # torch's float32 root is not always the nearest; the root in float64 rounds to it.
    root = torch.sqrt((mean + eps).double()).float()
    inverse = torch.div(torch.tensor(1.0), root)
    return (x * inverse) * weight
