"""Which layers of a dense model go onto the cards of a machine that is planned for."""

from dataclasses import replace

from localr1.card.fit import Share, share_of_cards
from localr1.card.forecast import CardForecast, forecast_card
from localr1.cli.output import format_bytes
from localr1.cli.plan import Asked
from localr1.cli.plan_machine import CardBudget, Machine
from localr1.errors import MemoryLimitError
from localr1.experts.placement import DEVICE_PROGRAM_BYTES, CardUse, Placement, TierUse
from localr1.quant.forecast import Forecast


def with_cards(
    placement: Placement, forecast: Forecast, machine: Machine, asked: Asked
) -> tuple[Placement, str]:
    """The placement in main memory with what `chat --device cuda` would put on the cards as well;
    and why they are not used, if they are not. Raises UsageError and MemoryLimitError where layers
    or cards were asked for that cannot be."""
    config = forecast.config
    if config.moe is not None or config.latent is not None:
        return placement, "which computes no experts that are not quantized alike"
    found = forecast_card(forecast.tensors, config, placement.context)
    needs = found.needs
    if not needs.layers:
        return placement, "which computes quantized layers alone"
    memory = [card.budget - DEVICE_PROGRAM_BYTES for card in machine.cards]
    names = [f"card {card.number}" for card in machine.cards]
    try:
        shares = share_of_cards(needs, memory, asked.gpu_layers, names)
    except MemoryLimitError:
        if asked.gpu_layers is not None or len(memory) > 1:
            raise
        short = needs.fixed + needs.layers[0] - memory[0]
        return placement, f"which lacks {format_bytes(short)}"
    uses = [_use(card, share, found) for card, share in zip(machine.cards, shares, strict=True)]
    return replace(placement, cards=tuple(uses)), ""


def _use(card: CardBudget, share: Share, forecast: CardForecast) -> CardUse:
    needs = forecast.needs
    cache = share.num_layers * forecast.cache
    weights = sum(needs.layers[share.first : share.last]) - cache
    workspace = needs.fixed
    if share.has_head:
        assert needs.head is not None
        weights += needs.head - forecast.logits
        workspace += forecast.logits
    tier = TierUse(card.budget, DEVICE_PROGRAM_BYTES, weights, cache, workspace, 0, 0)
    return CardUse(card.number, share.num_layers, share.has_head, tier)
