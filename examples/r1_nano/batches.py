"""Rows of token ids for training: one question and its reply each, padded to few lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from model import R1Nano
from torch import Tensor

PAD_ID = 2
IGNORED = -100
# Row lengths are rounded up to this: matrix shapes that repeat are much faster on CPU.
LENGTH_STEP = 16


@dataclass(frozen=True)
class Rows:
    """inputs and targets [rows, length]; targets are IGNORED before the reply and after its end."""

    inputs: Tensor
    targets: Tensor
    index: tuple[int, ...]


def make_rows(
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    rows: int,
    device: torch.device,
) -> list[Rows]:
    """Sorts by length into micro-batches of `rows`; `index` says which example each row is."""
    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, replies, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(order), rows):
        index = tuple(order[start : start + rows])
        width = -(-max(lengths[i] for i in index) // LENGTH_STEP) * LENGTH_STEP
        inputs = torch.full((len(index), width), PAD_ID)
        targets = torch.full((len(index), width), IGNORED)
        for row, i in enumerate(index):
            ids = torch.tensor(prompts[i] + replies[i])
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompts[i]) - 1 : len(ids) - 1] = torch.tensor(replies[i])
        batches.append(Rows(inputs.to(device), targets.to(device), index))
    return batches


def reply_logits(model: R1Nano, rows: Rows) -> tuple[Tensor, Tensor]:
    """Scores [n, vocab] and targets [n] of the reply tokens only, row after row."""
    kept = rows.targets != IGNORED
    return model.logits(model(rows.inputs)[kept]), rows.targets[kept]


def loss_and_correct(model: R1Nano, rows: Rows) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the replies, and which rows are right in every token [rows]."""
    logits, targets = reply_logits(model, rows)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    wrong = torch.zeros_like(rows.targets, dtype=torch.bool)
    wrong[rows.targets != IGNORED] = logits.detach().argmax(-1) != targets
    return loss, ~wrong.any(-1)
