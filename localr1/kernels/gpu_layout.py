"""Arguments of the GPU kernels: structures as ctypes passes them by value, those of cuda/blocks.h
among them."""

import ctypes
from typing import Final

from localr1.errors import KernelError
from localr1.kernels.api import RouterRule
from localr1.qtypes import ACTIVATION_GROUP, QuantScheme

MAX_ROUTED_EXPERTS: Final = 1024
MAX_ROUTER_LANES: Final = 32
"""Most experts a token, and most groups of experts, that the router's kernel takes."""


class MatrixLayout(ctypes.Structure):
    """`MatrixLayout` of cuda/blocks.h, 40 bytes. code, scale_type: the numbers of its `CodeType`
    and `ScaleType`.

    The kernels know rows_per_block and code when they are compiled; here they are filled in for the
    same structure on both sides."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rows_per_block", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("has_zero", ctypes.c_int32),
    )

    @staticmethod
    def of(
        rows: int, columns: int, rows_per_block: int, scheme: QuantScheme, scale_type: int
    ) -> "MatrixLayout":
        assert columns % ACTIVATION_GROUP == 0
        return MatrixLayout(
            rows,
            columns,
            rows_per_block,
            scheme.code_type,
            scheme.group_size,
            scale_type,
            not scheme.symmetric,
        )


class ExpertLayout(ctypes.Structure):
    """`ExpertLayout` of cuda/blocks.h, 120 bytes."""

    _fields_ = (("gate", MatrixLayout), ("up", MatrixLayout), ("down", MatrixLayout))


class RouterArguments(ctypes.Structure):
    """`RouterRule` of cuda/gpu/router.cu, 36 bytes."""

    _fields_ = (
        ("experts", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("kept_groups", ctypes.c_int32),
        ("group_score", ctypes.c_int32),
        ("softmax", ctypes.c_int32),
        ("normalized", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    )

    @staticmethod
    def of(rule: RouterRule) -> "RouterArguments":
        """Raises KernelError for a rule that the kernel cannot hold."""
        if (
            rule.num_experts > MAX_ROUTED_EXPERTS
            or max(rule.experts_per_token, rule.num_groups) > MAX_ROUTER_LANES
        ):
            raise KernelError(
                "route on a GPU",
                expected=f"at most {MAX_ROUTED_EXPERTS} experts, {MAX_ROUTER_LANES} groups and "
                f"{MAX_ROUTER_LANES} experts a token",
                found=str(rule),
            )
        return RouterArguments(*rule.numbers)
