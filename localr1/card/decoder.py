"""A model whose first layers, or all of it, a graphics card computes; the CPU computes the rest,
and everything once the card has failed.

The CPU keeps all weights in RAM: a card that fails costs one request, not the run.
"""

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.card.cache import CardCache
from localr1.card.layers import CardLayers
from localr1.card.workspace import TOKENS_OF_HEAD
from localr1.errors import ContextError, DeviceError, LocalR1Error
from localr1.kernels.gpu_driver import Driver
from localr1.models.config import ModelConfig
from localr1.models.decoder import Decoder
from localr1.models.step import Step


class CardDecoder:
    """`localr1.models.api.Model`. host: the whole model on the CPU. layers: its first ones on the
    card. Logits agree with the CPU's but for attention's sums (docs/arithmetic.md).

    Once the card has failed its caches are empty, and forward computes on the CPU.
    """

    def __init__(self, host: Decoder, driver: Driver, layers: CardLayers) -> None:
        self.config: ModelConfig = host.config
        self.weight_bytes = host.weight_bytes
        self.layers = layers
        self._host = host
        self._driver = driver
        self._lost: DeviceError | None = None
        self._is_closed = False

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    @property
    def where(self) -> str:
        """What is computed where, for the user."""
        layers = self.layers
        rest = " and the head" if layers.has_head else ", the CPU the rest"
        return (
            f"{self._driver.name} computes {layers.num_layers} of {self.config.num_layers} layers"
            f"{rest}; {layers.nbytes / 2**30:.1f} GiB of its memory are taken"
        )

    def new_cache(self, limit: int) -> Cache[Any]:
        """Raises ContextError for more positions than the card has room for too, and
        MemoryLimitError where other caches have taken it."""
        self._host.check_window(limit)
        if self._lost is not None:
            return self._host.new_cache(limit)
        if limit > self.layers.sizes.capacity:
            raise ContextError(
                "context window",
                expected=f"at most {self.layers.sizes.capacity} tokens, what the card has room for",
                found=limit,
                fix="Load the model with a larger context.",
            )
        self._driver.enter()
        memory = self.layers.sequence()
        cache = CardCache(self.config, self._host.cache_dtype, limit, memory)
        weakref.finalize(cache, self.layers.give_back, memory)
        return cache

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        if not isinstance(cache, CardCache) or cache.on_card is None:
            return self._host.forward(step, cache)
        if self._lost is not None:
            cache.leave_card()
            if step.start:
                raise self._lost  # What came before the step is lost as well.
            return self._host.forward(step, cache)
        num_tokens = self._host.check(step, cache)
        cache.reserve(num_tokens)
        x = self._host.embed(step.token_ids)
        results = self._on_card(x, step, cache)
        if not self.layers.has_head:
            self._host.run_layers(results, cache, step.start, self.layers.num_layers)
            results = self._host.logits(results if step.all_logits else results[-1:])
        cache.advance(num_tokens)
        return results

    def close(self) -> None:
        """As often as one likes."""
        if self._is_closed:
            return
        self._is_closed = True
        # A card that is lost frees nothing any more, and need not.
        with contextlib.suppress(LocalR1Error):
            self._driver.enter()
            self.layers.free()
        self._driver.close()

    def _on_card(self, x: Tensor, step: Step, cache: CardCache) -> Tensor:
        """What the card makes of these tokens: [T, hidden], or logits [1 or T, vocabulary]."""
        assert cache.on_card is not None
        every = step.all_logits or not self.layers.has_head
        most = self.layers.sizes.most_tokens
        if self.layers.has_head and step.all_logits:
            most = min(most, TOKENS_OF_HEAD)
        found: list[Tensor] = []
        begin, tokens = 0, len(x)
        try:
            self._driver.enter()
            while begin < tokens:
                some = x[begin : begin + most]
                is_last = begin + len(some) == tokens
                wanted = len(some) if every else int(is_last)
                result = self.layers.run(some, step.start + begin, cache.on_card, wanted)
                if wanted:
                    found.append(result.clone())
                begin += len(some)
        except LocalR1Error as error:
            config = self.config
            self._lost = DeviceError(
                f"{self._driver.name}: {min(most, tokens - begin)} tokens of {tokens} through "
                f"{self.layers.num_layers} layers of {config.hidden_size} x "
                f"{config.intermediate_size}",
                found=error,
            )
            cache.leave_card()
            raise self._lost from None
        return torch.cat(found) if len(found) > 1 else found[0]
