"""What gets one number of bits: the matrices that loaders make one of, and the recipe that says it.

vLLM fuses q, k and v, gate and up, q_a and kv_a: those of a layer share a choice. All routed
experts share one, as other runtimes want it (docs/quantization.md), unless each may have its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from localr1.models.config import LAYER_PREFIX
from localr1.qtypes import CARD_BITS, PORTABLE_BITS, SUPPORTED_BITS, QuantScheme
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.plan import Item, Plan
from localr1.quant.recipe import EMBEDDING, HEAD, KEEP_BITS, ROUTED_EXPERTS, Recipe, Rule

EXPERTS: Final = "experts"
PARTS: Final[Mapping[str, str]] = {
    EXPERTS: ROUTED_EXPERTS,
    "qkv": r".*self_attn\.(q|k|v)_proj$",
    "latent input": r".*self_attn\.(q_a_proj|kv_a_proj_with_mqa)$",
    "query": r".*self_attn\.q_b_proj$",
    "attention output": r".*self_attn\.o_proj$",
    "gate up": r".*mlp\.(gate|up)_proj$",
    "down": r".*mlp\.down_proj$",
    "shared gate up": r".*mlp\.shared_[a-z]+\.(gate|up)_proj$",
    "shared down": r".*mlp\.shared_[a-z]+\.down_proj$",
    "head": HEAD,
}
"""Patterns that do not overlap, of dense models and mixtures; kv_b_proj is in none."""
EMBEDDING_PART: Final = {"embedding": EMBEDDING}
"""Where the result need not be portable."""

MAX_PATTERN: Final = 900
"""Characters; readers take 1,024 (checkpoint/name_patterns.py)."""
_EXPERT: Final = re.compile(rf"{re.escape(LAYER_PREFIX)}(\d+){re.escape(EXPERTS_PART)}(\d+)\.")


@dataclass(frozen=True)
class Unit:
    """items: its matrices. layer, expert: their number, None where the unit has several. nbytes: by
    number of bits, what they take in the output."""

    part: str
    layer: int | None
    expert: int | None
    items: tuple[Item, ...]
    nbytes: Mapping[int, int]


def bits_to_choose(*, is_portable: bool) -> tuple[int, ...]:
    """Beside KEEP_BITS: of 5 and 6 bits SGLang and older versions of vLLM know nothing."""
    return PORTABLE_BITS if is_portable else SUPPORTED_BITS


def scheme_in(bits: int, like: QuantScheme) -> QuantScheme:
    """As `like`, but without the zero points that 8 bits gain nothing by."""
    return replace(like, bits=bits, symmetric=like.symmetric or bits == 8)


def recipe_in(
    bits: int,
    group_size: int,
    method: str,
    *,
    smooth: bool,
    is_portable: bool,
    asymmetric: bool = False,
) -> Recipe:
    """Every part in as many bits, from whose plan the units are made. asymmetric: with zero points,
    but for routed experts, which have none."""
    scheme = QuantScheme(bits, group_size)
    with_zeros = scheme_in(bits, QuantScheme(bits, group_size, symmetric=not asymmetric))
    parts = PARTS if is_portable else {**PARTS, **EMBEDDING_PART}
    # A table is looked up: it has no inputs that a method could choose by.
    rules = tuple(
        Rule(
            part,
            pattern,
            scheme if part == EXPERTS else with_zeros,
            "rtn" if pattern == EMBEDDING else method,
        )
        for part, pattern in parts.items()
    )
    return Recipe(rules, smooth=smooth)


def find_units(plans: Mapping[int, Plan], *, is_portable: bool) -> list[Unit]:
    """plans: of one checkpoint, by the bits of `recipe_in`. In the order of the plans. A head that
    is made from tied embeddings is none: kept, it takes no bytes and has no error."""
    first = plans[min(plans)]
    nbytes = {bits: {item.name: item.nbytes for item in plan.items} for bits, plan in plans.items()}
    found: dict[tuple[str, int | None, int | None], list[Item]] = {}
    embedding = first.dense[0].source.name
    for item in first.items:
        if item.rule is None or (item.rule.name == "head" and item.source.name == embedding):
            continue
        found.setdefault(_place(item, is_portable=is_portable), []).append(item)
    return [
        Unit(part, layer, expert, tuple(items), _sizes(part, items, nbytes))
        for (part, layer, expert), items in found.items()
    ]


def _place(item: Item, *, is_portable: bool) -> tuple[str, int | None, int | None]:
    assert item.rule is not None
    part = item.rule.name
    if part == EXPERTS:
        match = None if is_portable else _EXPERT.match(item.name)
        return part, *((None, None) if match is None else (int(match[1]), int(match[2])))
    layer = item.name.removeprefix(LAYER_PREFIX).partition(".")[0]
    return part, int(layer) if layer.isdecimal() else None, None


def _sizes(
    part: str, items: Sequence[Item], nbytes: Mapping[int, Mapping[str, int]]
) -> dict[int, int]:
    sizes = {bits: sum(each[item.name] for item in items) for bits, each in nbytes.items()}
    if part == EXPERTS:  # Which no runtime takes unpacked; on a card 5 and 6 bits take 8.
        return {bits: size for bits, size in sizes.items() if bits in CARD_BITS}
    sizes[KEEP_BITS] = sum(2 * item.source.shape[0] * item.source.shape[1] for item in items)
    return sizes


def recipe_of(units: Sequence[Unit], bits: Sequence[int], like: Recipe) -> Recipe:
    """bits: of each unit; KEEP_BITS are kept. like: of `recipe_in`, for all but the bits. Where
    layers of a part differ, each rule has their numbers; of the experts those with more bits are
    named one by one, before one rule for the rest."""
    rules: list[Rule] = []
    models = {rule.name: rule for rule in like.rules if isinstance(rule, Rule)}
    places: dict[str, list[tuple[Unit, int]]] = {}
    for unit, each in zip(units, bits, strict=True):
        places.setdefault(unit.part, []).append((unit, each))
    for part, chosen in places.items():
        model = models[part]
        for each in sorted(SUPPORTED_BITS, reverse=True):
            units_of = [unit for unit, found in chosen if found == each]
            is_last = part == EXPERTS and each == min(SUPPORTED_BITS)
            if not units_of:
                patterns = []
            elif len(units_of) == len(chosen) or is_last:
                patterns = [model.pattern]
            elif part == EXPERTS:
                patterns = _of_experts(units_of)
            else:
                patterns = _of_layers(model.pattern, units_of)
            scheme = scheme_in(each, model.scheme)
            rules += [Rule(part, pattern, scheme, model.method) for pattern in patterns]
    return Recipe(tuple(rules), smooth=like.smooth)


def _of_layers(pattern: str, units: Sequence[Unit]) -> list[str]:
    numbers = [unit.layer for unit in units if unit.layer is not None]
    tail = pattern.removeprefix(".*")
    return [f"{re.escape(LAYER_PREFIX)}({each})\\.{tail}" for each in _alternatives(numbers)]


def _of_experts(units: Sequence[Unit]) -> list[str]:
    layers: dict[int, list[int]] = {}
    for unit in units:
        if unit.layer is not None and unit.expert is not None:
            layers.setdefault(unit.layer, []).append(unit.expert)
    prefix, part = re.escape(LAYER_PREFIX), re.escape(EXPERTS_PART)
    return [
        rf"{prefix}{layer}{part}({each})\.(gate|up|down)_proj$"
        for layer, numbers in layers.items()
        for each in _alternatives(numbers)
    ]


def _alternatives(numbers: Iterable[int]) -> list[str]:
    """ "0|1|7", in as many texts as it takes to be short."""
    texts = [""]
    for number in numbers:
        longer = f"{texts[-1]}|{number}" if texts[-1] else str(number)
        if len(longer) > MAX_PATTERN:
            texts.append(str(number))
        else:
            texts[-1] = longer
    return texts
