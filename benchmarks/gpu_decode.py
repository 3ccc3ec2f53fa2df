"""Decode on a graphics card against the limit of its memory, with all of a mixture's experts there,
and with a half, a quarter and an eighth of them.

    python benchmarks/gpu_decode.py                 # V2-Lite and Qwen3-30B, written here first
    python benchmarks/gpu_decode.py MODEL --shares 100,25

Tokens are those that the model says of itself. The hit rate is what the store counted in the run
that is timed. The limit: every dense weight and every expert that hit is read once at the rate at
which the card copies its memory, reads and writes both counted, while the CPU reads every expert
that missed at the rate at which it was measured, in the same process, to compute experts; the
longer of the two. At 70% of it a step is good. Without a card it says so in one sentence.
"""

import argparse
import statistics
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from experts import decode
from geometry import write
from geometry_sizes import GEOMETRIES
from gpu_bench import open_bench_card, write_results

from localr1.cli.measure import sampled_ids
from localr1.engine.engine import Engine
from localr1.errors import LocalR1Error
from localr1.experts.options import ExpertOptions
from localr1.load import load_engine
from localr1.quant.recipe import Recipe

MODELS = ("v2-lite", "qwen3-30b-a3b")
SHARES = "100,50,25,12.5"
TO_REACH = 0.7
BUILT = Path(__file__).resolve().parent.parent / "build" / "geometry"


@dataclass(frozen=True)
class Rates:
    """Bytes a second. card: that it reads of its memory. cpu: of experts that it computes."""

    card: float
    cpu: float


@dataclass(frozen=True)
class Figure:
    """share: of the experts, that the card has room for; None for a dense model. hit_rate: of
    experts, on the card. tokens: a second. limit: the most there can be."""

    model: str
    where: str
    share: float | None
    hit_rate: float
    tokens: float
    limit: float

    @property
    def reached(self) -> float:
        return self.tokens / self.limit


def limit_of(dense: float, hit: float, missed: float, rates: Rates) -> float:
    """Tokens a second, from bytes a token of dense weights, and of experts that hit and missed."""
    return 1.0 / max((dense + hit) / rates.card, missed / rates.cpu)


def cpu_rate(engine: Engine, ids: list[int]) -> float:
    """Bytes a second of experts on the CPU, all in RAM; of a dense model nothing, without limit."""
    store = engine.experts
    if store is None:
        return float("inf")
    before = store.usage.copy()
    decode(engine, ids)
    used = store.usage - before
    return used.ram_bytes / used.ram_seconds


def figure(
    path: Path, ids: list[int], share: float | None, rates: Rates, repetitions: int
) -> Figure:
    vram = None if share is None else f"{100 * share:g}%"
    options = ExpertOptions(device="cuda", vram=vram)
    with closing(load_engine(path, experts=options)) as engine:
        decode(engine, ids)  # Fills the card with what these tokens need.
        store = engine.experts
        before = None if store is None else store.usage.copy()
        seconds = [decode(engine, ids) for _ in range(repetitions)]
        tokens = len(ids) / statistics.median(seconds)
        dense = float(engine.model.weight_bytes)
        hit = missed = 0.0
        hit_rate = 1.0
        if store is not None and before is not None:
            used = store.usage - before
            count = len(ids) * repetitions
            dense -= store.slot_bytes * store.num_experts
            hit = used.device_bytes / count
            missed = (used.ram_bytes + used.disk_bytes) / count
            hit_rate = hit / (hit + missed)
        return Figure(
            engine.name, engine.where, share, hit_rate, tokens, limit_of(dense, hit, missed, rates)
        )


def measure(
    path: Path, shares: list[float], tokens: int, repetitions: int, card_rate: float
) -> list[Figure]:
    with closing(load_engine(path)) as engine:
        ids = sampled_ids(engine.model, tokens)
        rates = Rates(card_rate, cpu_rate(engine, ids))
        is_mixture = engine.experts is not None
    return [
        figure(path, ids, share, rates, repetitions) for share in (shares if is_mixture else [None])
    ]


def written(name: str) -> Path:
    """The model of this geometry with random weights, made where it is not there."""
    path = BUILT / name
    if not (path / "config.json").exists():
        print(f"writing {path}", flush=True)
        recipe = Recipe.uniform(4, attention_bits=8, shared_bits=8, smooth=False)
        write(GEOMETRIES[name], path, recipe)
    return path


def table(card: str, card_rate: float, figures: list[Figure]) -> list[str]:
    lines = [
        f"{card}: copies its memory at {card_rate / 1e9:.0f} GB/s (reads and writes). "
        f"{time.strftime('%d %B %Y')}. Measured, none projected; "
        f"to reach: {TO_REACH:.0%} of the limit.",
        "",
        "| model | experts there is room for | hit | tok/s | limit | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for each in figures:
        share = "dense" if each.share is None else f"{each.share:.1%}"
        lines.append(
            f"| {each.model} | {share} | {each.hit_rate:.1%} | {each.tokens:.1f} | "
            f"{each.limit:.1f} | {each.reached:.0%} |"
        )
    return [*lines, "", *dict.fromkeys(f"{each.model}: {each.where}." for each in figures)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", type=Path, help="default: written here")
    parser.add_argument("--shares", default=SHARES, help="percent of the experts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    try:
        card = open_bench_card()
    except LocalR1Error as error:
        print(f"Not measured: {error}", file=sys.stderr)
        return error.exit_code
    name = card.driver.name
    try:
        card_rate = card.copy_rate()
    finally:
        card.driver.close()
    shares = [float(each) / 100 for each in arguments.shares.split(",")]
    figures: list[Figure] = []
    for path in arguments.models or [written(each) for each in MODELS]:
        figures += measure(path, shares, arguments.tokens, arguments.repetitions, card_rate)
    data = {"card": name, "copy_rate": card_rate, "torch": torch.__version__}
    write_results(
        "gpu_decode",
        name,
        table(name, card_rate, figures),
        {**data, "figures": [{**asdict(each), "reached": each.reached} for each in figures]},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
