"""How well the policies keep experts, and what that costs (docs/simulate.md).

python benchmarks/policy.py curves          made traces beside the published curves
python benchmarks/policy.py hits [TRACE..]  hit rates of the policies at seven budgets; of
                                            these files or made traces, else of all made ones
python benchmarks/policy.py cost            microseconds a token at R1's size
python benchmarks/policy.py write NAME OUT  a made trace as a file, for `localr1 simulate`

"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from localr1.experts.policy import Belady, Ranking, make_ranking
from localr1.experts.replay import replay_demand, replay_promotion
from localr1.experts.residency import Residency
from localr1.experts.synthetic import R1, ROUTINGS, SyntheticRouting, synthetic_trace
from localr1.experts.trace import Trace, read_trace, write_trace

SHARES: Final = (0.06, 0.125, 0.25, 0.40, 0.50, 0.60, 0.75)
PUBLISHED: Final = {
    "synthetic-qwen3-30b-a3b": (
        (47, 65, 83, 94, 97, 98, 100),
        (64, 80, 92, 97, 98, 99, 100),
    ),
    "synthetic-v2-lite": (
        (19, 33, 49, 64, 73, 80, 90),
        (39, 55, 72, 84, 88, 92, 96),
    ),
}
"""Percent of hits of LRU and of the oracle, as read off the figures of arXiv 2505.16056."""
POLICIES: Final = ("lru", "lfu", "adaptive", "belady")
INSERT_CAP: Final = 8
MADE_LAYERS: Final = 12
COST_CAPS: Final = (1, 4, 8)
WARM_UP: Final = 200


def few_layers(routing: SyntheticRouting, tokens: int) -> Trace:
    """Two sequences of so many tokens through MADE_LAYERS: the layers of a made trace are alike."""
    return synthetic_trace(replace(routing, num_layers=MADE_LAYERS), 2, tokens)


def layer_curves(trace: Trace, skip: int) -> tuple[list[float], list[float]]:
    """Percent of hits of LRU and of the oracle at SHARES, each layer with slots of its own. A token
    hits what is held before it; what it misses comes in, and then the worst go, its own included.
    The first `skip` tokens do not count."""
    tokens, layers, per_token = trace.experts.shape
    rows = np.arange(layers)[:, None]
    choices = trace.experts.astype(np.int64)
    repeats = np.empty(choices.shape)
    soonest = np.full((layers, trace.num_experts), np.inf)
    for token in range(tokens - 1, -1, -1):
        repeats[token] = soonest[rows, choices[token]]
        soonest[rows, choices[token]] = token
    found: tuple[list[float], list[float]] = ([], [])
    for share in SHARES:
        slots = max(1, round(share * trace.num_experts))
        for is_oracle in (False, True):
            # The lower the better: minus the last use, or the next one.
            worth = np.full((layers, trace.num_experts), np.inf)
            hits = 0
            for token, chosen in enumerate(choices):
                if token >= skip:
                    hits += int(np.isfinite(worth[rows, chosen]).sum())
                worth[rows, chosen] = repeats[token] if is_oracle else -token
                worth[rows, chosen] -= np.arange(per_token) / (2 * per_token)
                worst = np.partition(worth, slots - 1, axis=1)[:, slots - 1 : slots]
                worth[worth > worst] = np.inf
            found[is_oracle].append(100 * hits / ((tokens - skip) * layers * per_token))
    return found


def print_curves() -> None:
    """The made traces, and their distance from what they are made after."""
    print("LRU/oracle, percent of hits by share of a layer's experts held")
    print(f"{'':26}" + "".join(f"{share:>9.1%}" for share in SHARES))
    for routing in ROUTINGS.values():
        curves = layer_curves(few_layers(routing, 1000), skip=500)
        print(f"{routing.name:26}" + _pairs(curves))
        if routing.name in PUBLISHED:
            published = PUBLISHED[routing.name]
            print(f"{'  published':26}" + _pairs(published))
            errors = np.array(curves) - np.array(published)
            print(
                f"  distance: {np.sqrt((errors**2).mean()):.1f} points (root mean square), "
                f"at most {np.abs(errors).max():.1f}"
            )


def _pairs(curves: Sequence[Sequence[float]]) -> str:
    return "".join(f"{lru:>6.0f}/{oracle:<2.0f}" for lru, oracle in zip(*curves, strict=True))


def hit_rates(trace: Trace, policy: str, style: str) -> list[float]:
    """Percent of hits at SHARES of all experts in one pool. style: "demand", every miss comes in,
    from nothing; "promotion", at most INSERT_CAP after a token, from slots that were filled without
    knowledge."""
    _, layers, per_token = trace.experts.shape
    rates = []
    for share in SHARES:
        slots = max(2 * per_token, int(share * layers * trace.num_experts + 1e-9))
        is_oracle = policy == "belady"
        ranking: Ranking = (
            Belady(trace) if is_oracle else make_ranking(policy, layers, trace.num_experts)
        )
        residency = Residency(
            layers,
            trace.num_experts,
            slots,
            ranking,
            insert_cap=0 if style == "demand" else INSERT_CAP,
            layer_floor=0.0 if is_oracle else None,
            exact=is_oracle,
        )
        if style == "demand":
            hits = replay_demand(trace, residency)
        else:
            for promotion in residency.warm_start():
                residency.complete(promotion)
            hits, _ = replay_promotion(trace, residency)
        rates.append(100 * hits / trace.experts.size)
    return rates


def print_hits(trace: Trace) -> None:
    """Every policy, and what the adaptive one gains and leaves."""
    tokens, layers, per_token = trace.experts.shape
    print(
        f"{trace.model}: {tokens:,} tokens, {layers} layers, {per_token} of "
        f"{trace.num_experts}; percent of hits by share of all experts held"
    )
    for style in ("demand", "promotion"):
        print(f"  {style:18}" + "".join(f"{share:>8.1%}" for share in SHARES))
        rates = {}
        for policy in POLICIES:
            rates[policy] = hit_rates(trace, policy, style)
            print(f"  {policy:18}" + _row(rates[policy]), flush=True)
        best = np.maximum(rates["lru"], rates["lfu"])
        print(f"  {'over the better':18}" + _row(np.array(rates["adaptive"]) - best))
        print(
            f"  {'below the oracle':18}"
            + _row(np.array(rates["belady"]) - np.array(rates["adaptive"])),
            flush=True,
        )


def _row(values: Sequence[float] | np.ndarray) -> str:
    return "".join(f"{value:>8.1f}" for value in values)


def print_cost() -> None:
    """Of what a decoded token adds: telling the ranking of every layer, closing the pass, and
    deciding what to promote. The copies themselves are begun and ended outside."""
    routing: SyntheticRouting = R1
    trace = synthetic_trace(routing, 4, 400)
    choices = trace.experts.astype(np.int64)
    print(
        f"{routing.num_layers} layers, {routing.experts_per_token} of {routing.num_experts}, a "
        "quarter held; microseconds a token"
    )
    for cap in COST_CAPS:
        ranking = make_ranking("adaptive", routing.num_layers, routing.num_experts)
        residency = Residency(
            routing.num_layers,
            routing.num_experts,
            routing.num_layers * routing.num_experts // 4,
            ranking,
            insert_cap=cap,
        )
        for promotion in residency.warm_start():
            residency.complete(promotion)
        seconds = []
        processor = []
        promoted = 0
        for token in choices:
            layers = list(token)
            begin, busy = time.perf_counter(), time.thread_time()
            chosen = []
            for experts in layers:
                chosen.append(experts)  # noqa: PERF402  As the store, which is told layer by layer.
            ranking.observe_layers(0, chosen)
            ranking.tick(1)
            promotions = residency.promotions()
            seconds.append(time.perf_counter() - begin)
            processor.append(time.thread_time() - busy)
            promoted += len(promotions)
            for promotion in promotions:
                residency.complete(promotion)
        counted = sorted(seconds[WARM_UP:])
        print(
            f"  insert cap {cap}: median {1e6 * statistics.median(counted):.0f}, of the quickest "
            f"twentieth {1e6 * counted[len(counted) // 20]:.0f}, least "
            f"{1e6 * counted[0]:.0f}; of processor time, which other programs do not take part in, "
            f"mean {1e6 * statistics.fmean(processor[WARM_UP:]):.0f}; "
            f"{promoted / len(choices):.1f} promotions a token"
        )


def main() -> None:
    """One part of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("curves")
    parts.add_parser("hits").add_argument("traces", nargs="*", default=list(ROUTINGS))
    parts.add_parser("cost")
    write = parts.add_parser("write")
    write.add_argument("name", choices=sorted(ROUTINGS))
    write.add_argument("out", type=Path)
    write.add_argument("--sequences", type=int, default=4)
    write.add_argument("--tokens", type=int, default=200, help="of each, half its prompt")
    arguments = parser.parse_args()
    if arguments.part == "curves":
        print_curves()
    elif arguments.part == "hits":
        for name in arguments.traces:
            made = ROUTINGS.get(name)
            print_hits(read_trace(Path(name)) if made is None else few_layers(made, 400))
    elif arguments.part == "cost":
        print_cost()
    else:
        routing = ROUTINGS[arguments.name]
        write_trace(synthetic_trace(routing, arguments.sequences, arguments.tokens), arguments.out)


if __name__ == "__main__":
    main()
