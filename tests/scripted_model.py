"""A model whose next token is a function of every token in its cache, so that a cache that differs
from what the engine believes gives another text."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_tokenizer import VOCAB_SIZE
from torch import Tensor

from localr1.cache.dense import DenseCache
from localr1.cache.sequence import Cache
from localr1.errors import ContextError
from localr1.layers.rope import DefaultRope
from localr1.models.config import ModelConfig
from localr1.models.step import Step

CONFIG = ModelConfig(
    architecture="scripted",
    num_layers=1,
    hidden_size=1,
    intermediate_size=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    vocab_size=VOCAB_SIZE,
    max_positions=4096,
    tie_embeddings=True,
    rms_norm_eps=1e-6,
    rope=DefaultRope(theta=10000.0),
)


def hashed(ids: list[int]) -> int:
    """Some printable ASCII byte's id, from all of `ids` in their order."""
    state = 17
    for identifier in ids:
        state = (state * 31 + identifier + 1) % 1_000_003
    return 20 + state % 60


def follow(prompt_length: int, reply: list[int]) -> Callable[[list[int]], int]:
    """Whatever the prompt of that length, say `reply`."""
    return lambda ids: reply[len(ids) - prompt_length]


@dataclass
class ScriptedModel:
    """next_token: the ids in the cache to the next one. steps: (start, tokens) of every forward
    pass. fail_at: the pass, counted from now, that raises `failure` or gives NaN for None.
    cancel_at: the pass during which `cancel` is set."""

    next_token: Callable[[list[int]], int] = hashed
    config: ModelConfig = CONFIG
    weight_bytes: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    fail_at: int | None = None
    failure: BaseException | None = None
    cancel_at: int | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def same_bits(self, num_tokens: int) -> bool:
        return True

    def new_cache(self, limit: int) -> DenseCache:
        if limit > self.config.max_positions:
            raise ContextError("context window")
        return DenseCache(1, 1, 1, torch.float32, limit)

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        assert step.start == cache.length
        count = len(step.token_ids)
        cache.reserve(count)
        keys = cache.layer(0).k[0, :, 0]
        keys[step.start : step.start + count] = step.token_ids.float()
        if self.cancel_at is not None:
            self.cancel_at -= 1
            if self.cancel_at < 0:
                self.cancel.set()
        rows = count if step.all_logits else 1
        logits = torch.zeros(rows, VOCAB_SIZE)
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                if self.failure is not None:
                    raise self.failure
                logits[-1, 5] = torch.nan
        self.steps.append((step.start, count))
        cache.advance(count)
        ids = keys[: cache.length].int().tolist()
        for row in range(rows):
            logits[row, self.next_token(ids[: len(ids) - rows + row + 1])] += 50.0
        return logits
