"""What the tensors of a checkpoint add up to, by kind and stored type, from headers alone."""

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localr1.checkpoint.api import Checkpoint, TensorInfo

KINDS = (
    ("embedding", re.compile(r"(^|\.)embed_tokens\.")),
    ("head", re.compile(r"(^|\.)lm_head\.")),
    ("attention", re.compile(r"\.self_attn\.\w+_proj(_with_mqa)?\.")),
    ("experts", re.compile(r"\.mlp\.experts\.")),
    ("router", re.compile(r"\.mlp\.gate\.")),
    ("mlp", re.compile(r"\.mlp\.(shared_experts\.)?\w+_proj\.")),
    ("norm", re.compile(r"norm\.")),
)
# The suffixes of one packed matrix (compressed-tensors, pack-quantized).
PACKED, SCALE, SHAPE, ZERO = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
)
EXPERT = re.compile(r"(.*\.mlp\.experts\.\d+)\.")


@dataclass(frozen=True)
class WeightGroup:
    """All tensors of one kind and one stored type. bits: bits a weight, scales included."""

    kind: str
    type: str
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def is_packed(tensors: "Mapping[str, TensorInfo]", prefix: str) -> bool:
    return (
        {prefix + PACKED, prefix + SCALE, prefix + SHAPE} <= tensors.keys()
        and len(tensors[prefix + PACKED].shape) == len(tensors[prefix + SCALE].shape) == 2
        and tensors[prefix + SHAPE].shape == (2,)
    )


def packed_entry(checkpoint: "Checkpoint", prefix: str) -> tuple[str, int, int]:
    """(type, parameters, bytes) of the packed matrix at `prefix`. Its shape is the one small tensor
    that is read: the packed one is rounded up to whole words."""
    tensors = checkpoint.tensors
    parts = [
        tensors[prefix + suffix]
        for suffix in (PACKED, SCALE, SHAPE, ZERO)
        if prefix + suffix in tensors
    ]
    rows, columns = (int(size) for size in checkpoint.read(prefix + SHAPE).tolist())
    bits = 32 * tensors[prefix + PACKED].shape[1] // max(columns, 1)
    group = columns // max(tensors[prefix + SCALE].shape[1], 1)
    zero_point = "-zp" if prefix + ZERO in tensors else ""
    return f"int{bits}-g{group}{zero_point}", rows * columns, sum(part.nbytes for part in parts)


def weight_groups(checkpoint: "Checkpoint") -> list[WeightGroup]:
    """Every tensor, gathered by kind and type, in the order of KINDS."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    tensors = checkpoint.tensors
    for name, info in tensors.items():
        prefix = next(
            (name.removesuffix(end) for end in (PACKED, SCALE, SHAPE, ZERO) if name.endswith(end)),
            None,
        )
        if prefix is None or not is_packed(tensors, prefix):
            stored, parameters, nbytes = info.dtype, prod(info.shape), info.nbytes
        elif name.endswith(PACKED):
            stored, parameters, nbytes = packed_entry(checkpoint, prefix)
        else:
            continue
        found.setdefault((kind_of(name), stored), []).append((parameters, nbytes))
    groups = [
        WeightGroup(kind, stored, len(each), sum(p for p, _ in each), sum(b for _, b in each))
        for (kind, stored), each in found.items()
    ]
    order = [kind for kind, _ in KINDS] + ["other"]
    return sorted(groups, key=lambda group: (order.index(group.kind), -group.bytes))


def expert_bytes(tensors: "Mapping[str, TensorInfo]") -> dict[str, int]:
    """Routed expert -> bytes of its weights, without the few that only state a shape."""
    found: dict[str, int] = {}
    for name, info in tensors.items():
        if (match := EXPERT.match(name)) and not name.endswith(SHAPE):
            found[match[1]] = found.get(match[1], 0) + info.nbytes
    return found
