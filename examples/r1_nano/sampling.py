"""Batched sampling from r1-nano with MLA's latent cache; outputs that begin alike are one row."""

from collections.abc import Sequence

import torch
from batches import PAD_ID
from model import LatentCache, R1Nano
from torch import Tensor

EOS_ID = 1
# The rows of a batch and the reach of the cache are rounded up to this: matrix shapes that repeat
# are much faster on CPU.
SHAPE_STEP = 16


def choose(logits: Tensor, row: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token for each output [n], from the logits [rows, vocab] of the row that it is on [n];
    temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)[row]
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand(len(row), 1, generator=generator, device=logits.device)
    # Scaled to the sum, which is 1 but for rounding, so that no draw lies beyond the last token.
    return torch.searchsorted(cumulative[row], drawn * cumulative[row, -1:], right=True)[
        :, 0
    ].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: R1Nano,
    prompts: Sequence[list[int]],
    *,
    outputs: int = 1,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Continues every prompt `outputs` times, until the end token (kept) or `max_new_tokens`.

    The outputs of a prompt stand together in the result. As long as they are alike, token by token,
    they share one row of the batch, which splits where they part: the same distribution at a
    fraction of the work. The generator must live on the model's device.
    """
    model.eval()
    device, vocabulary = model.device, model.config.vocab_size
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(positions.max())
    capacity = width + max_new_tokens
    caches = model.new_caches(len(prompts), capacity)
    ids = torch.full((len(prompts), width), PAD_ID)
    for place, prompt in enumerate(prompts):
        ids[place, : len(prompt)] = torch.tensor(prompt)
    hidden = model(ids.to(device), caches)
    logits = model.logits(hidden[torch.arange(len(prompts), device=device), positions - 1])
    replies: list[list[int]] = [[] for _ in range(len(prompts) * outputs)]
    active = torch.arange(len(replies), device=device)
    row = active // outputs
    for _ in range(max_new_tokens):
        token = choose(logits, row, temperature, generator)
        for output, chosen in zip(active.tolist(), token.tolist(), strict=True):
            replies[output].append(chosen)
        running = token != EOS_ID
        active, row, token = active[running], row[running], token[running]
        if len(active) == 0:
            break
        branch, row = torch.unique(row * vocabulary + token, return_inverse=True)
        # Rows that only fill up the shape repeat the first one, and nothing reads them.
        branch = torch.cat((branch, branch[:1].expand(-len(branch) % SHAPE_STEP)))
        source, token = branch // vocabulary, branch % vocabulary
        if not torch.equal(source, torch.arange(len(positions), device=device)):
            _keep(caches, source)
            positions = positions[source]
        limit = -(-(int(positions.max()) + 1) // SHAPE_STEP) * SHAPE_STEP
        logits = model.logits(model.decode(token, positions, caches, min(limit, capacity)))
        positions = positions + 1
    return replies


def _keep(caches: list[LatentCache], index: Tensor) -> None:
    for cache in caches:
        cache.keep(index)
