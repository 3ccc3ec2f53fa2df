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
# Conversations are several times as long: padded to one, a micro-batch would be mostly padding.
USUAL_LENGTH = 176


@dataclass(frozen=True)
class Rows:
    """inputs and targets [rows, length]; targets are IGNORED before the reply and after its end."""

    inputs: Tensor
    targets: Tensor
    index: tuple[int, ...]


def make_rows(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    rows: int,
    device: torch.device,
    unknown: Sequence[range] | None = None,
) -> list[Rows]:
    """Sorts by length into micro-batches of at most `rows`, fewer where they are long; `index` says
    which example each row is. unknown: of each reply the places of tokens that are no targets."""
    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, replies, strict=True)]
    batches = []
    for index in _split(lengths, rows):
        width = _rounded(max(lengths[i] for i in index))
        inputs = torch.full((len(index), width), PAD_ID)
        targets = torch.full((len(index), width), IGNORED)
        for row, i in enumerate(index):
            ids = torch.tensor([*prompts[i], *replies[i]])
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompts[i]) - 1 : len(ids) - 1] = torch.tensor(replies[i])
            if unknown is not None:
                first = len(prompts[i]) - 1
                targets[row, first + unknown[i].start : first + unknown[i].stop] = IGNORED
        batches.append(Rows(inputs.to(device), targets.to(device), index))
    return batches


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _split(lengths: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """Indices in the order of length, at most `rows` and rows * USUAL_LENGTH tokens together,
    unless one alone is longer."""
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(parts[-1]) + 1 if parts else 0
        fits = size <= rows and size * _rounded(lengths[index]) <= rows * USUAL_LENGTH
        if parts and fits:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [tuple(part) for part in parts]


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
