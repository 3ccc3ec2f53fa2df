"""Batched sampling from r1-nano with MLA's latent cache; finished rows leave the batch."""

from collections.abc import Sequence

import torch
from batches import PAD_ID
from model import LatentCache, R1Nano
from torch import Tensor

EOS_ID = 1
# Finished rows are dropped, and the cache is read, in steps of this many rows or tokens.
COMPACT_STEP = 16


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits [B, vocab]; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: R1Nano,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Continues every prompt until its end token or `max_new_tokens`; the end token is kept.

    The generator must live on the model's device.
    """
    model.eval()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = int(lengths.max())
    caches = model.new_caches(len(prompts), width + max_new_tokens)
    ids = torch.full((len(prompts), width), PAD_ID)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden = model(ids.to(model.device), caches)
    active = torch.arange(len(prompts), device=model.device)
    token = choose(model.logits(hidden[active, lengths - 1]), temperature, generator)
    replies: list[list[int]] = [[] for _ in prompts]
    positions = lengths
    for _ in range(max_new_tokens):
        for row, chosen in zip(active.tolist(), token.tolist(), strict=True):
            if not replies[row] or replies[row][-1] != EOS_ID:
                replies[row].append(chosen)
        running = token != EOS_ID
        remaining = int(running.sum())
        if remaining == 0:
            break
        # Rows beyond the last multiple go on as they are: their further tokens are not kept.
        if len(active) - remaining >= COMPACT_STEP or remaining < COMPACT_STEP:
            keep = running.nonzero()[:, 0]
            active, positions, token = active[keep], positions[keep], token[keep]
            _keep(caches, keep)
        limit = -(-(int(positions.max()) + 1) // COMPACT_STEP) * COMPACT_STEP
        hidden = model.decode(token, positions, caches, min(limit, width + max_new_tokens))
        fresh = choose(model.logits(hidden), temperature, generator)
        # A finished row still in the batch repeats its end token.
        token = torch.where(token == EOS_ID, token, fresh)
        positions = (positions + 1).clamp(max=width + max_new_tokens - 1)
    return replies


def _keep(caches: list[LatentCache], index: Tensor) -> None:
    for cache in caches:
        cache.keep(index)
