"""Prefill and decode against llama.cpp: same model, same bits, same threads, one alternating run.

    python benchmarks/compare_llama_cpp.py --gguf MODEL.gguf --peer-python PEER/bin/python

PEER is an environment with `llama-cpp-python` built from source for this machine (its default,
GGML_NATIVE=ON). Both sides hold the block matrices at 4 bits in groups of 32 with 16-bit scales
(llama.cpp: Q4_0) and embedding and head at 8 bits (Q8_0). Each side is one child process; the two
are timed in turn, A B A B, so that a machine whose speed drifts slows both; the ratio is taken pair
by pair. Timed are the forward passes alone: no sampling, no tokenizer. Defaults are llama-bench's:
pp512, tg128.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

WORKERS = Path(__file__).parent / "workers"


class Worker:
    """A child that answers one request a line."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = " ".join(command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ready = self.receive()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command} ended early; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, prefix: list[int], batches: list[list[int]]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prefix": prefix, "batches": batches}) + "\n")
        self.process.stdin.flush()
        return float(self.receive()["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # Not Linux: the portable name below is all there is.
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Test:
    """The batches are timed, after a prefix that is not. tokens: in the batches."""

    prefix: list[int]
    batches: list[list[int]]
    tokens: int

    def rate(self, worker: Worker) -> float:
        """Tokens a second."""
        return self.tokens / worker.seconds(self.prefix, self.batches)


def make_tests(options: argparse.Namespace) -> dict[str, Test]:
    """By llama-bench's names, of random tokens."""
    choose = random.Random(0)
    prompt = [choose.randrange(100, options.vocabulary) for _ in range(options.prompt)]
    generated = [[choose.randrange(100, options.vocabulary)] for _ in range(options.generate)]
    return {
        f"pp{options.prompt}": Test([], [prompt], options.prompt),
        f"tg{options.generate}": Test([], generated, options.generate),
        f"tg{options.generate}@{options.prompt}": Test(prompt, generated, options.generate),
    }


def compare(ours: Worker, peer: Worker, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, test in make_tests(options).items():
        for worker in (ours, peer):
            test.rate(worker)  # Warm-up: page in, allocate scratch.
        pairs = []
        for repetition in range(options.repetitions):
            order = (ours, peer) if repetition % 2 == 0 else (peer, ours)
            rates = {worker: test.rate(worker) for worker in order}
            pairs.append((rates[ours], rates[peer]))
        result[name] = summary(pairs)
    return result


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """pairs: tokens a second of localr1 and llama.cpp, timed next to each other."""
    ratios = sorted(a / b for a, b in pairs)
    return {
        "localr1": statistics.median(a for a, _ in pairs),
        "llama.cpp": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def print_result(about: dict[str, Any], result: dict[str, Any]) -> None:
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    print("| test | localr1 tok/s | llama.cpp tok/s | ratio (median of pairs) | range |")
    print("|---|---|---|---|---|")
    for name, row in result.items():
        low, high = row["ratio_range"]
        print(
            f"| {name} | {row['localr1']:.1f} | {row['llama.cpp']:.1f} "
            f"| {row['ratio']:.2f} | {low:.2f}-{high:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="source of both sides' weights")
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--vocabulary", type=int, default=32000, help="token ids drawn below this")
    parser.add_argument("--work", type=Path, help="keep the quantized models here and reuse them")
    parser.add_argument("--isa", default=None, help="force a build of our kernels")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = options.prompt + options.generate + 16
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        model = work / "localr1-int4"
        if not model.is_dir():
            quantize(options.gguf, model, Recipe.uniform(bits=4, group_size=32, attention_bits=4))
        common = ["--threads", str(options.threads), "--context", str(context)]
        isa = ["--isa", options.isa] if options.isa else []
        ours = Worker(
            [
                *(sys.executable, str(WORKERS / "localr1_worker.py"), "--model", str(model)),
                *common,
                *isa,
            ]
        )
        source = ["--source", str(options.gguf), "--quantized", str(work / "q4_0.gguf")]
        peer = Worker([options.peer_python, str(WORKERS / "llama_cpp_worker.py"), *source, *common])
        result = compare(ours, peer, options)
        about = {
            "processor": processor(),
            "threads": options.threads,
            "localr1": ours.ready["kernels"],
            "llama-cpp-python": peer.ready["version"],
        }
        ours.close()
        peer.close()
    if options.json:
        print(json.dumps({"about": about, "result": result}, indent=2))
    else:
        print_result(about, result)


if __name__ == "__main__":
    main()
