"""What an expert store is made of and told."""

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from localr1.experts.placement import READ_THREADS
from localr1.kernels.native_experts import ExpertForm
from localr1.layers.router import Router

INSERT_CAP: Final = 8
"""Promotions in flight at once."""


@dataclass(frozen=True)
class StoreOptions:
    """policy: a name of `policy.RANKINGS`; "static" moves nothing into the device after the start.
    read_ahead: None: as measured. read_threads: reads at once."""

    policy: str = "adaptive"
    read_ahead: bool | None = None
    read_threads: int = READ_THREADS


@dataclass(frozen=True)
class Layer:
    """number: the model's. form: how its experts are packed. router, norm, eps: for a guess of what
    it will choose."""

    number: int
    form: ExpertForm
    num_experts: int
    router: Router
    norm: Tensor
    eps: float
