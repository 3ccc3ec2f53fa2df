"""A model whose first layers, or all of it, graphics cards compute; the CPU computes the rest, and
everything once a card has failed.

The CPU keeps all weights in RAM: a card that fails costs one request, not the run.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.candidates import AllLogits, Candidates, Sought
from localr1.card.cache import CardCache
from localr1.card.chain import CardChain
from localr1.card.layers import Segment, SequenceMemory
from localr1.card.mixture import CardExperts
from localr1.errors import ContextError, DeviceError, LocalR1Error
from localr1.models.config import ModelConfig
from localr1.models.decoder import Decoder
from localr1.models.step import Step


class RoutedExperts(Protocol):
    """The routed experts of a model, some of which lie on the card that computes their layer."""

    def of_layer(self, card: int, number: int) -> CardExperts:
        """Of a mixture that this card computes; both by their numbers."""
        ...

    def settle(self) -> None:
        """Before a token: wait for what the host's part of it must not wait for."""
        ...

    def refresh(self, card: int, stream: Any) -> None:
        """Then, of each card by its number: give its stream the tables that have changed."""
        ...

    def check(self) -> None:
        """After a token: raise what kept the host from computing its part."""
        ...

    def lose_card(self) -> None:
        """A card has failed; the CPU has all of them from now on."""
        ...


class CardDecoder:
    """`localr1.models.api.Model`. host: the whole model on the CPU. layers: its first ones on
    cards. Logits agree with the CPU's but for attention's sums (docs/arithmetic.md).

    A token goes through the cards' layers in one go, mixtures among them. More tokens, a prompt's,
    do so where there are no mixtures; else the host computes those (layers/moe.py), with whatever
    experts a device has, and hands over what comes out.

    Once a card has failed all caches are empty, and forward computes on the CPU. owns_drivers:
    whether `close` closes them.
    """

    def __init__(self, host: Decoder, layers: CardChain, *, owns_drivers: bool) -> None:
        self.config: ModelConfig = host.config
        self.weight_bytes = host.weight_bytes
        self.layers = layers
        self._host = host
        self._owns_drivers = owns_drivers
        self._experts: RoutedExperts | None = None
        self._lost: DeviceError | None = None
        self._is_closed = False

    def use_experts(self, experts: RoutedExperts) -> None:
        """Of the mixtures, once they lie somewhere."""
        self._experts = experts
        for number, card in enumerate(self.layers.cards):
            card.use_experts({index: experts.of_layer(number, index) for index in card.mixtures})

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    @property
    def where(self) -> str:
        """What is computed where, for the user."""
        layers = self.layers
        kind = ", all but routed experts," if layers.mixtures else ""
        rest = f"{kind} and the head" if layers.has_head else f"{kind or ','} the CPU the rest"
        first, *others = layers.cards
        shares = "".join(f" and {card.driver.name} {card.num_layers}" for card in others)
        return (
            f"{first.driver.name} computes {first.num_layers}{shares} of {self.config.num_layers} "
            f"layers{rest}; {layers.nbytes / 2**30:.1f} GiB of {'their' if others else 'its'} "
            "memory are taken"
        )

    def same_bits(self, num_tokens: int) -> bool:
        """Not promised: a card that is lost between two passes leaves the rest to the CPU, whose
        attention sums in another order."""
        return False

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
        memory = self.layers.sequence()
        cache = CardCache(self.config, self._host.cache_dtype, limit, memory)
        weakref.finalize(cache, self.layers.give_back, memory)
        return cache

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        results = self._forward(step, cache, None)
        assert isinstance(results, Tensor)
        return results

    def select(self, step: Step, cache: Cache[Any], sought: Sought) -> Candidates | Tensor:
        """`localr1.models.api.SelectingModel`."""
        found = self._forward(step, cache, sought)
        if isinstance(found, Tensor):
            return found
        return replace(found, all_logits=partial(self._all_logits, found.all_logits, cache))

    def _forward(self, step: Step, cache: Cache[Any], sought: Sought | None) -> Candidates | Tensor:
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
        try:
            with self._host.observed(num_tokens):
                results = self._through_layers(x, step, cache, cache.on_card, sought)
        except DeviceError as error:
            self._lose(error)
            cache.leave_card()
            raise
        cache.advance(num_tokens)
        return results

    def close(self) -> None:
        """As often as one likes."""
        if self._is_closed:
            return
        self._is_closed = True
        self.layers.free()
        if self._owns_drivers:
            self.layers.close_drivers()

    def _through_layers(
        self,
        x: Tensor,
        step: Step,
        cache: CardCache,
        memory: Sequence[SequenceMemory],
        sought: Sought | None,
    ) -> Candidates | Tensor:
        """Logits [1 or T, vocabulary] of these tokens, or what is sought of them."""
        layers, host = self.layers, self._host
        if layers.mixtures and len(x) > 1:
            *segments, last = layers.segments
            for segment in segments:
                x = self._run(x, step.start, memory, segment)
                host.layers[segment.last - 1][1](x)
        elif layers.mixtures:
            last = layers.whole
            self._refresh_experts()
        else:
            last = layers.whole
        results: Candidates | Tensor
        if layers.has_head:
            results = self._run_to_head(x, step, memory, last, sought)
        else:
            x = self._run(x, step.start, memory, last)
        if layers.mixtures and len(x) == 1:
            assert self._experts is not None
            self._experts.check()
        if layers.has_head:
            return results
        host.run_layers(x, cache, step.start, layers.num_layers)
        return host.logits(x if step.all_logits else x[-1:])

    def _refresh_experts(self) -> None:
        assert self._experts is not None
        with self._using_the_cards(1):
            self._experts.settle()
            for number, card in enumerate(self.layers.cards):
                card.driver.enter()
                self._experts.refresh(number, card.stream)

    def _run(
        self, x: Tensor, start: int, memory: Sequence[SequenceMemory], segment: Segment
    ) -> Tensor:
        """[T, hidden], a new tensor."""
        found = torch.empty_like(x)
        most = self.layers.sizes.most_tokens
        with self._using_the_cards(min(len(x), most)):
            for begin in range(0, len(x), most):
                some = x[begin : begin + most]
                result = self.layers.run(some, start + begin, memory, len(some), segment)
                found[begin : begin + most] = result
        return found

    def _run_to_head(
        self,
        x: Tensor,
        step: Step,
        memory: Sequence[SequenceMemory],
        segment: Segment,
        sought: Sought | None,
    ) -> Candidates | Tensor:
        """Logits of every token or of the last, a new tensor, or what is sought of the last."""
        most, every = self.layers.sizes.most_tokens, step.all_logits
        found: list[Tensor] = []
        with self._using_the_cards(min(len(x), most)):
            for begin in range(0, len(x), most):
                some = x[begin : begin + most]
                is_last = begin + len(some) == len(x)
                wanted = len(some) if every else int(is_last)
                start = step.start + begin
                if is_last and sought is not None:
                    last = self.layers.select(some, start, memory, segment, sought)
                    return last.clone() if isinstance(last, Tensor) else last
                result = self.layers.run(some, start, memory, wanted, segment)
                if wanted:
                    found.append(result.clone())
        return torch.cat(found)

    def _all_logits(self, get: AllLogits, cache: Cache[Any]) -> Tensor:
        """Of the last pass, through this cache."""
        try:
            with self._using_the_cards(1):
                return get()
        except DeviceError as error:
            self._lose(error)
            assert isinstance(cache, CardCache)
            cache.leave_card()
            raise

    @contextlib.contextmanager
    def _using_the_cards(self, tokens: int) -> Iterator[None]:
        """Whatever a driver raises is its card's failure."""
        try:
            yield
        except LocalR1Error as error:
            config = self.config
            raise DeviceError(
                f"{self.layers.name}: {tokens} {'token' if tokens == 1 else 'tokens'} through "
                f"{self.layers.num_layers} layers of {config.hidden_size} x "
                f"{config.intermediate_size}",
                found=error,
            ) from None

    def _lose(self, error: DeviceError) -> None:
        self._lost = error
        if self._experts is not None:
            self._experts.lose_card()
