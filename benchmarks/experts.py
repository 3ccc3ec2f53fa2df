"""The expert store against what the simulator says of it: the same tokens, the same budgets.

    python benchmarks/experts.py MODEL --ram 50%
    python benchmarks/experts.py MODEL --ram 50% --device simulated:2GiB,pcie=10GB/s

The model says some tokens with all its experts in RAM. They are decoded again from cold tiers with
the budgets asked for, timed, their routing recorded; the simulator replays that routing with the
same budgets and the bandwidths of this machine, which are measured in the same process just before
and just after, as a shared machine's speed drifts: the means of what the model's own experts get on
the CPU, of all its other weights, and of reads of its own shards.
"""

import argparse
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localr1.cli.measure import sampled_ids
from localr1.engine.engine import Engine
from localr1.experts.hardware import HardwareProfile
from localr1.experts.options import ExpertOptions, SimulatedSpec, parse_device
from localr1.experts.recorder import RoutingRecorder
from localr1.experts.simulate import Budgets, MixtureSizes, Prediction, simulate
from localr1.experts.trace import Trace
from localr1.experts.usage import ExpertUsage
from localr1.load import LoadOptions, load_engine, make_backend
from localr1.models.step import Step

GIGA = 1e9


def decode(engine: Engine, ids: list[int]) -> float:
    """Seconds of one token after another."""
    cache = engine.model.new_cache(len(ids))
    begin = time.perf_counter()
    for position, token in enumerate(ids):
        engine.model.forward(Step(torch.tensor([token]), position), cache)
    return time.perf_counter() - begin


def measured_profile(engine: Engine, ids: list[int]) -> tuple[HardwareProfile, MixtureSizes]:
    """With every expert in RAM: what of a token's time experts take, and what all else."""
    assert engine.experts is not None
    store = engine.experts
    before = store.usage.copy()
    seconds = decode(engine, ids)
    used = store.usage - before
    dense = engine.model.weight_bytes - store.slot_bytes * store.num_experts
    rest = seconds - used.ram_seconds  # With the head, which is after the store's passes.
    return HardwareProfile(
        name="this machine, with the model's own weights",
        vram_bytes=0,
        ram_bytes=0,
        gpu_large=0.0,
        gpu_small=0.0,
        pcie=0.0,
        cpu=used.ram_bytes / used.ram_seconds / GIGA,
        dense=dense * len(ids) / rest / GIGA,
        disk=read_bandwidth(engine),
        round_trip_us=0.0,
    ), MixtureSizes(store.slot_bytes, dense)


def with_all_in_memory(
    arguments: argparse.Namespace, threads: int
) -> tuple[list[int], HardwareProfile, MixtureSizes]:
    """What the model says, and `measured_profile` of it; its memory is free again afterwards."""
    with closing(load_engine(arguments.model, threads=threads)) as engine:
        ids = sampled_ids(engine.model, arguments.tokens)
        return ids, *measured_profile(engine, ids)


def mean_profile(first: HardwareProfile, second: HardwareProfile) -> HardwareProfile:
    """Of the rates that were measured."""
    rates = ("cpu", "dense", "disk")
    return replace(
        first, **{name: (getattr(first, name) + getattr(second, name)) / 2 for name in rates}
    )


def read_bandwidth(engine: Engine) -> float:
    """GB/s of experts on their way from their files into slots, several at once."""
    assert engine.experts is not None
    return engine.experts.measure_reads() / GIGA


def threads_beside(device: str, threads: int | None) -> int:
    """Of the CPU, beside those that stand in for a device."""
    _, left, made = make_backend(LoadOptions(threads, experts=ExpertOptions(device=device)))
    for device_made in made:
        device_made.close()
    return left


def run(
    arguments: argparse.Namespace, ids: list[int], sizes: MixtureSizes
) -> tuple[ExpertUsage, float, Trace, Budgets, dict[str, Any]]:
    """What the engine did, its seconds, its choices, what it had, and what it measured of the
    device itself (`HardwareProfile`'s fields)."""
    options = ExpertOptions(
        arguments.ram, None, arguments.device, arguments.policy, arguments.read_ahead
    )
    with closing(
        load_engine(arguments.model, threads=arguments.threads, experts=options)
    ) as engine:
        assert engine.experts is not None
        store = engine.experts
        recorder = RoutingRecorder(engine.model, engine.name)
        budgets = Budgets(
            store.num_device_slots * store.slot_bytes, store.num_ram_slots * store.slot_bytes
        )
        before = store.usage.copy()
        seconds = decode(engine, ids)
        recorder.end_sequence(0)
        used = store.usage - before
        spec = parse_device(arguments.device)
        of_device: dict[str, Any] = {}
        if spec is not None:
            rates = store.rates
            assert rates is not None
            link = sizes.expert_bytes / rates.link
            if isinstance(spec, SimulatedSpec):
                link = spec.link_bandwidth
            rate = sizes.expert_bytes / rates.device(1) / GIGA
            of_device = {
                "vram_bytes": store.devices[0].memory,
                "gpu_large": rate,
                "gpu_small": rate,
                "pcie": link / GIGA,
                "cpu": sizes.expert_bytes / rates.cpu(1) / GIGA,
            }
        return used, seconds, recorder.trace(), budgets, of_device


def report(used: ExpertUsage, seconds: float, said: Prediction) -> list[tuple[str, float, float]]:
    """(what, engine, simulator)."""
    return [
        ("hit rate", used.hit_rate, said.hit_rate),
        ("computed there", used.device_hits / used.uses, said.device_uses / said.uses),
        ("from RAM", used.ram_hits / used.uses, said.ram_uses / said.uses),
        ("disk GB", used.disk_bytes / GIGA, said.disk_bytes / GIGA),
        ("tokens/s", used.tokens / seconds, said.tokens_per_second),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="50%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--read-ahead", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    threads = threads_beside(arguments.device, arguments.threads)
    ids, before, sizes = with_all_in_memory(arguments, threads)
    used, seconds, trace, budgets, of_device = run(arguments, ids, sizes)
    _, after, _ = with_all_in_memory(arguments, threads)
    profile = replace(mean_profile(before, after), **of_device)
    said = simulate(trace, sizes, profile, budgets, arguments.policy)
    rows = report(used, seconds, said)
    if arguments.json:
        print(json.dumps({name: {"engine": ours, "simulator": its} for name, ours, its in rows}))
        return
    print(
        f"experts on the CPU {profile.cpu:.1f} GB/s, other weights {profile.dense:.1f}, disk "
        f"{profile.disk:.2f}; bound by {used.bound}, says the simulator {said.bound}; read ahead "
        f"{used.prefetched}, of which used {used.prefetch_hits}"
    )
    print("| | engine | simulator | ratio |\n|---|---|---|---|")
    for name, ours, its in rows:
        print(f"| {name} | {ours:.3f} | {its:.3f} | {ours / its if its else 1.0:.3f} |")


if __name__ == "__main__":
    main()
