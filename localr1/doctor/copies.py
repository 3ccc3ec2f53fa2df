"""How fast bytes get to a graphics card and back: what an expert that lies in RAM waits for."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

NBYTES: Final = 256 << 20
"""Of one copy, or an eighth of the card's free memory where that is less."""
LEAST: Final = 1 << 20
REPETITIONS: Final = 5


@dataclass(frozen=True)
class CopySpeeds:
    """GB/s (10^9 bytes). card: its number. to_card, from_card: by page-locked memory. pageable: to
    the card from ordinary memory. within: from one place of the card to another, each byte counted
    once though it is read and written."""

    card: int
    to_card: float
    from_card: float
    pageable: float
    within: float


def cuda_copy_speeds(number: int, cards: Mapping[str, int]) -> CopySpeeds:
    """Of the card that CUDA gives this number. cards: the driver's numbers by the cards' UUIDs, as
    CUDA may count in another order. Raises RuntimeError where the card cannot be opened or has no
    memory free."""
    import torch

    device = torch.device("cuda", number)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    free, _ = torch.cuda.mem_get_info(device)
    return copy_speeds(
        cards.get(uuid, number),
        device,
        max(min(NBYTES, free // 8), LEAST),
        lambda: torch.cuda.synchronize(device),
        page_locked=True,
    )


def copy_speeds(
    card: int,
    device: "torch.device",
    nbytes: int,
    synchronize: Callable[[], None],
    *,
    page_locked: bool,
) -> CopySpeeds:
    """synchronize: waits until the device has done all. page_locked: whether RAM's side of copies
    can be; only a card's driver can make it so."""
    import torch

    ordinary = torch.ones(nbytes, dtype=torch.uint8)
    locked = torch.ones(nbytes, dtype=torch.uint8, pin_memory=page_locked)
    here = torch.empty(nbytes, dtype=torch.uint8, device=device)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def speed(target: torch.Tensor, source: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(REPETITIONS):
            synchronize()
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize()
            best = min(best, time.perf_counter() - begin)
        return nbytes / best / 1e9

    return CopySpeeds(
        card=card,
        to_card=speed(here, locked),
        from_card=speed(locked, here),
        pageable=speed(here, ordinary),
        within=speed(there, here),
    )
