"""A mixture of experts at its real size against llama.cpp, and against the memory it reads from.

    python benchmarks/geometry.py write v2-lite V2 --dense-bits 4
    python benchmarks/geometry.py gguf V2 V2.gguf
    python benchmarks/compare_mixture.py --model V2 --gguf V2.gguf --peer-python PEER/bin/python

Both sides compute the same model: the same codes, in groups of 32, as Q4_0 (the head as Q8_0). As
compare_llama_cpp.py: one child process a side, timed in turn, forward passes alone. Between the
pairs this process reads plain memory with as many threads, and decoding is also given as bytes a
second: those of every matrix that a token goes through, with its share of the experts, and of the
cache at half of its final length.

Both models must fit into memory at once. Where they do not, --apart loads them one after the other
in each of the repetitions.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import psutil
from compare_llama_cpp import WORKERS, Test, Worker, make_tests, print_result, processor, summary
from kernels import read_bandwidth

from localr1.checkpoint.reader import open_checkpoint
from localr1.models.registry import parse_config
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.plan import EMBEDDING_WEIGHT

MARGIN = 2 << 30
"""Bytes left to the system and the buffers of both sides."""
CACHE_BYTES = 2
"""Of a value of the cache, on both sides."""


def bytes_per_token(path: Path) -> int:
    """Of weights that are read to decode one token. path: a directory or GGUF file."""
    with open_checkpoint(path) as checkpoint:
        moe = parse_config(checkpoint.config).moe
        sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    assert moe is not None
    sizes.pop(EMBEDDING_WEIGHT)  # One row of it.
    routed = sum(nbytes for name, nbytes in sizes.items() if EXPERTS_PART in name)
    chosen = routed * moe.router.experts_per_token // moe.router.num_experts
    return sum(sizes.values()) - routed + chosen


def cached_bytes(path: Path, positions: int) -> int:
    """Of the cache, at so many positions."""
    with open_checkpoint(path) as checkpoint:
        config = parse_config(checkpoint.config)
    return config.num_layers * config.cached_values * positions * CACHE_BYTES


class Sides:
    """Both children, together or one at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = options.prompt + options.generate + 16
        common = ["--threads", str(options.threads), "--context", str(context)]
        ours = [sys.executable, str(WORKERS / "localr1_worker.py"), "--model", str(options.model)]
        files = ["--source", str(options.gguf), "--quantized", str(options.gguf)]
        self._commands = {
            "localr1": [*ours, *common, *(["--isa", options.isa] if options.isa else [])],
            "llama.cpp": [
                *(options.peer_python, str(WORKERS / "llama_cpp_worker.py")),
                *files,
                *common,
            ],
        }
        self._apart = options.apart
        self._running: dict[str, Worker] = {}
        self.about: dict[str, Any] = {"processor": processor(), "threads": options.threads}

    def worker(self, name: str) -> Worker:
        """Started, warmed up by the caller."""
        if name not in self._running:
            if self._apart:
                self.close()
            worker = self._running[name] = Worker(self._commands[name])
            ready = worker.ready
            self.about[name] = ready["kernels"] if name == "localr1" else ready["version"]
        return self._running[name]

    def close(self) -> None:
        for worker in self._running.values():
            worker.close()
        self._running.clear()


def run(
    sides: Sides, tests: dict[str, Test], options: argparse.Namespace
) -> tuple[dict[str, Any], float]:
    """The result of each test, and the median bandwidth of plain reading in GB/s."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in tests}
    plain: list[float] = []
    warm: set[tuple[Worker, str]] = set()
    for repetition in range(options.repetitions):
        order = ("localr1", "llama.cpp") if repetition % 2 == 0 else ("llama.cpp", "localr1")
        rates: dict[tuple[str, str], float] = {}
        # Apart, a side does all its tests before the other is loaded; else test by test.
        turns = [(side, name) for name in tests for side in order]
        if options.apart:
            turns = [(side, name) for side in order for name in tests]
        for side, name in turns:
            worker = sides.worker(side)
            if (worker, name) not in warm:
                tests[name].rate(worker)  # Page in, allocate scratch.
                warm.add((worker, name))
            rates[side, name] = tests[name].rate(worker)
        for name, results in pairs.items():
            results.append((rates["localr1", name], rates["llama.cpp", name]))
        plain.append(read_bandwidth(options.threads, 3))
    return {name: summary(results) for name, results in pairs.items()}, statistics.median(plain)


def print_bandwidth(result: dict[str, Any], plain: float, options: argparse.Namespace) -> None:
    """Of the tests that decode."""
    print(f"\nplain read of memory: {plain:.1f} GB/s")
    print("| test | side | MB a token | GB/s | of plain read |")
    print("|---|---|---|---|---|")
    for name, row in result.items():
        if not name.startswith("tg"):
            continue
        past = (options.prompt if "@" in name else 0) + options.generate // 2
        for side, path in (("localr1", options.model), ("llama.cpp", options.gguf)):
            read = bytes_per_token(path) + cached_bytes(options.model, past)
            speed = read * row[side] / 1e9
            print(f"| {name} | {side} | {read / 1e6:.0f} | {speed:.1f} | {speed / plain:.0%} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="written by geometry.py write")
    parser.add_argument("--gguf", type=Path, required=True, help="written by geometry.py gguf")
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=32000, help="token ids drawn below this")
    parser.add_argument("--isa", default=None, help="force a build of our kernels")
    parser.add_argument("--apart", action="store_true", help="one model in memory at a time")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    weights = sum(file.stat().st_size for file in options.model.iterdir())
    weights += options.gguf.stat().st_size
    free = psutil.virtual_memory().available
    if not options.apart and free < weights + MARGIN:
        raise SystemExit(
            f"both models take {weights / 2**30:.1f} GiB, {free / 2**30:.1f} are free: use --apart"
        )
    sides = Sides(options)
    try:
        result, plain = run(sides, make_tests(options), options)
    finally:
        sides.close()
    if options.json:
        print(json.dumps({"about": sides.about, "result": result, "plain": plain}, indent=2))
        return
    print_result(sides.about, result)
    print_bandwidth(result, plain, options)


if __name__ == "__main__":
    main()
