"""How fast a placement will be, before it runs: a limit model. Never imports torch.

A step takes as long as the slowest of what works at the same time: the GPU on the experts it holds,
the CPU on the others, the disk on those that no memory holds; after it what every token reads.
Beside them only the calls of a layer cost something, so that a prediction is an upper bound for a
machine of these bandwidths, with a policy as good as dropping what was used longest ago.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from localr1.experts.footprint import Footprint
from localr1.experts.hardware import HardwareProfile
from localr1.experts.placement import Placement

GIGA = 1e9
LAYER_SECONDS = 75e-6
"""What a layer of one token takes on the CPU beyond its bytes: SmolLM2's 4.5 ms a token in
benchmarks/README.md, less its 90 MB at the 41 GB/s read there, over 30 layers."""

HELD = (0.0, 0.06, 0.125, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Shares of all experts that the curves below speak of."""
HITS_DEEPSEEK = (0.0, 0.19, 0.33, 0.49, 0.64, 0.73, 0.80, 0.90, 1.0)
HITS_QWEN3 = (0.0, 0.47, 0.65, 0.83, 0.94, 0.97, 0.98, 1.0, 1.0)
"""Share of a token's experts found in a cache of that share which drops what was used longest ago:
DeepSeek-V2-Lite and Qwen3-30B-A3B, read off the figures of arXiv 2505.16056. There is no such curve
of DeepSeek-R1; its router is a kin of V2-Lite's."""
HIT_CURVES = {"qwen3_moe": HITS_QWEN3}
"""By architecture; any other is taken for a DeepSeek."""


@dataclass(frozen=True)
class Speed:
    """seconds: of each thing that takes part, of one step; those at the same time are compared.
    tokens: of the step. bound: the slowest of them."""

    tokens: int
    seconds: float
    parts: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True)
class Shares:
    """Of the experts a token chooses: found in graphics memory, in main memory, on disk."""

    vram: float
    ram: float
    disk: float


def hit_rate(architecture: str, held: float) -> float:
    """held: share of all experts that a cache holds, 0 to 1."""
    return _interpolated(HELD, HIT_CURVES.get(architecture, HITS_DEEPSEEK), held)


def decode_shares(placement: Placement) -> Shares:
    """What a token finds where, the experts of each memory being those it needs most."""
    footprint = placement.footprint
    count = footprint.num_experts
    if not count:
        return Shares(0.0, 0.0, 0.0)
    architecture = footprint.config.architecture
    if placement.cards:
        in_vram = _hits_on_cards(placement, architecture)
    else:
        in_vram = hit_rate(architecture, placement.experts_in_vram / count)
    on_disk = 1 - hit_rate(architecture, 1 - placement.experts_on_disk / count)
    return Shares(in_vram, 1 - on_disk - in_vram, on_disk)


def _hits_on_cards(placement: Placement, architecture: str) -> float:
    """Each card holds experts of its own mixtures."""
    mixtures = sum(card.num_mixtures for card in placement.cards)
    of_mixture = placement.footprint.num_experts / mixtures
    return sum(
        card.num_mixtures
        / mixtures
        * hit_rate(architecture, card.tier.slots / (card.num_mixtures * of_mixture))
        for card in placement.cards
        if card.num_mixtures
    )


def predict_decode(placement: Placement, hardware: HardwareProfile, cached: int) -> Speed:
    """One token after `cached` others."""
    footprint, shares = placement.footprint, decode_shares(placement)
    if placement.cards and footprint.num_experts:
        hardware = _as_one_card(placement, hardware)
    elif placement.cards:
        parts = _decode_layers(placement, hardware, cached)
        return Speed(1, sum(parts.values()), parts)
    routed = footprint.routed_per_token / GIGA
    every = (
        (footprint.dense + footprint.cache(cached)) / GIGA / _dense_bandwidth(placement, hardware)
    )
    parts = {"weights of every token": every}
    if not placement.is_on_gpu:
        parts["calls of the kernels"] = footprint.config.num_layers * LAYER_SECONDS
    missed = shares.ram + shares.disk
    if routed:
        parts["experts on the CPU"] = missed * routed / hardware.cpu
        parts["disk"] = shares.disk * routed / hardware.disk
    if routed and placement.is_on_gpu:
        gpu = hardware.gpu(footprint.expert)
        parts["experts on the GPU"] = shares.vram * routed / gpu
        mixtures = 0 if footprint.config.moe is None else len(footprint.config.moe.layers)
        # A layer whose experts all hit waits for nobody; of k experts that is rare.
        waiting = 1 - shares.vram**footprint.experts_per_token
        parts["round trips"] = waiting * mixtures * hardware.round_trip_us * 1e-6
    together = ("experts on the GPU", "experts on the CPU", "disk")
    seconds = max((parts.get(part, 0.0) for part in together), default=0.0)
    seconds += sum(value for part, value in parts.items() if part not in together)
    return Speed(1, seconds, parts)


def _decode_layers(
    placement: Placement, hardware: HardwareProfile, cached: int
) -> dict[str, float]:
    """Of a dense model on cards: one after another, then the CPU with the rest."""
    footprint, layers = placement.footprint, placement.footprint.config.num_layers
    cache = footprint.cache(cached) / layers
    there = sum(
        (card.tier.weights + card.num_layers * cache) / hardware.cards[card.number].dense
        for card in placement.cards
    )
    parts = {"layers on the GPU": there / GIGA}
    left = layers - placement.layers_on_cards
    weights = footprint.dense - sum(card.tier.weights for card in placement.cards)
    if left or not placement.cards[-1].has_head:
        parts["layers on the CPU"] = (weights + left * cache) / GIGA / hardware.cpu
        parts["calls of the kernels"] = left * LAYER_SECONDS
    return parts


def predict_prefill(placement: Placement, hardware: HardwareProfile, tokens: int) -> Speed:
    """A prompt of `tokens` in one chunk, nothing before it. Attention itself is left out: it is
    little while a prompt is short."""
    footprint, on_gpu = placement.footprint, placement.is_on_gpu
    if placement.cards and footprint.num_experts:
        hardware = _as_one_card(placement, hardware)
    elif placement.cards:
        parts = _prefill_layers(placement, hardware, tokens)
        return Speed(tokens, sum(parts.values()), parts)
    macs = hardware.gpu_gmacs if on_gpu else hardware.cpu_gmacs
    computing = tokens * _dense_parameters(footprint) / GIGA / macs
    reading = footprint.dense / GIGA / _dense_bandwidth(placement, hardware)
    parts = {"weights of every token": max(computing, reading)}
    if not footprint.num_experts or footprint.config.moe is None:
        return Speed(tokens, sum(parts.values()), parts)
    moe = footprint.config.moe
    count, per_token = moe.router.num_experts, moe.router.experts_per_token
    # Distinct experts of a layer that a prompt's tokens choose, were all alike popular.
    chosen = count * (1 - (1 - per_token / count) ** tokens) * len(moe.layers)
    pairs = tokens * per_token * len(moe.layers)
    pair_gmacs = 3 * footprint.config.hidden_size * moe.intermediate_size / GIGA
    expert = footprint.expert / GIGA
    in_vram = placement.experts_in_vram / footprint.num_experts
    on_disk = placement.experts_on_disk / footprint.num_experts
    outside = (1 - in_vram) * chosen
    on_cpu = max(
        outside * expert / hardware.cpu, (1 - in_vram) * pairs * pair_gmacs / hardware.cpu_gmacs
    )
    parts["disk"] = on_disk * chosen * expert / hardware.disk
    if on_gpu:
        # Copied to the GPU or computed where they lie, whichever is faster.
        copied = outside * expert / hardware.pcie
        parts |= {"PCIe": copied} if copied < on_cpu else {"experts on the CPU": on_cpu}
        there = pairs * (1.0 if copied < on_cpu else in_vram)
        read = in_vram * chosen * expert / hardware.gpu(footprint.expert)
        parts["experts on the GPU"] = max(there * pair_gmacs / hardware.gpu_gmacs, read)
    else:
        parts["experts on the CPU"] = on_cpu
    together = max(value for part, value in parts.items() if part != "weights of every token")
    return Speed(tokens, parts["weights of every token"] + together, parts)


def _prefill_layers(
    placement: Placement, hardware: HardwareProfile, tokens: int
) -> dict[str, float]:
    """As `_decode_layers`; a layer's share of the multiply-adds is that of all layers."""
    footprint, layers = placement.footprint, placement.footprint.config.num_layers
    gmacs = tokens * _dense_parameters(footprint) / layers / GIGA
    there = 0.0
    for card in placement.cards:
        profile = hardware.cards[card.number]
        reading = card.tier.weights / GIGA / profile.dense
        there += max(card.num_layers * gmacs / profile.gmacs, reading)
    parts = {"layers on the GPU": there}
    left = layers - placement.layers_on_cards
    if left:
        weights = footprint.dense - sum(card.tier.weights for card in placement.cards)
        parts["layers on the CPU"] = max(
            left * gmacs / hardware.cpu_gmacs, weights / GIGA / hardware.cpu
        )
    return parts


def _as_one_card(placement: Placement, hardware: HardwareProfile) -> HardwareProfile:
    """The machine with a card that takes as long as a mixture's cards do one after another. Of a
    card's experts no more is known than of its other weights: it is to the first card in both as in
    one."""
    cards = [(card, hardware.cards[card.number]) for card in placement.cards]
    weights = sum(card.tier.weights for card, _ in cards)
    mixtures = sum(card.num_mixtures for card, _ in cards)
    dense = weights / sum(card.tier.weights / profile.dense for card, profile in cards)
    slowness = sum(card.num_mixtures / mixtures / profile.dense for card, profile in cards)
    experts = 1 / (slowness * hardware.dense)
    gmacs = 0.0
    if all(profile.gmacs for _, profile in cards):
        seconds = sum(card.num_layers / profile.gmacs for card, profile in cards)
        gmacs = placement.layers_on_cards / seconds
    return replace(
        hardware,
        dense=dense,
        gpu_large=experts * hardware.gpu_large,
        gpu_small=experts * hardware.gpu_small,
        gpu_gmacs=gmacs,
    )


def _dense_bandwidth(placement: Placement, hardware: HardwareProfile) -> float:
    """GB/s. Without a device in use, all is the CPU's work whatever else the machine has."""
    return hardware.dense if placement.is_on_gpu or not hardware.has_gpu else hardware.cpu


def _dense_parameters(footprint: Footprint) -> int:
    """That each token of a prompt is multiplied by: without the routed experts, the token table and
    the head, which only the last one needs."""
    config = footprint.config
    moe = config.moe
    routed = 0
    if moe is not None and footprint.num_experts:
        each = 3 * config.hidden_size * moe.intermediate_size
        routed = len(moe.layers) * moe.router.experts_per_token * each
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return config.active_parameter_count - routed - tables


def _interpolated(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    for (left, low), (right, high) in pairwise(zip(xs, ys, strict=True)):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return ys[-1]
