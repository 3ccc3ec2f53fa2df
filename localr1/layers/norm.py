"""Root-mean-square norm in plain torch float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    x: float32 [..., features]; weight: [features].
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
