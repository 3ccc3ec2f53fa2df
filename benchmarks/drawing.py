"""What drawing a token costs the host: from all logits, and from the candidates that a card would
have found among them (docs/gpu.md), and how often those are not enough.

    python benchmarks/drawing.py SmolLM2-135M-Instruct.Q4_1.gguf --vocabulary 129280

The logits are a model's own on the evaluation's text. Where a larger vocabulary is asked for, its
other tokens have those of the model's again, 5 lower. Takes one core.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from localr1.candidates import Candidates, Sought
from localr1.card.selection import CAPACITY
from localr1.kernels.native import NativeKernels
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.sampler import Sampler, SamplingParams

SETTINGS = {
    "temperature 0.6, top-p 0.95": SamplingParams(0.6, top_p=0.95, seed=1),
    "temperature 1, top-p 0.95": SamplingParams(1.0, top_p=0.95, seed=1),
    "temperature 0.6, top-k 20, top-p 0.95": SamplingParams(0.6, 20, 0.95, seed=1),
    "temperature 1, min-p 0.05": SamplingParams(1.0, top_p=1.0, min_p=0.05, seed=1),
    "temperature 1": SamplingParams(1.0, top_p=1.0, seed=1),
}


def rows(path: Path, vocabulary: int, positions: int) -> list[NDArray[np.float32]]:
    """Logits [vocabulary] of each position."""
    model, tokenizer = evaluate.load(path, NativeKernels(threads=1))
    ids = evaluate.windows_of(tokenizer, evaluate.read_text(None), positions)[0]
    logits = model.forward(Step(ids, 0, all_logits=True), model.new_cache(len(ids))).numpy()
    size = max(vocabulary, logits.shape[1])
    lower = (5 * (np.arange(size) // logits.shape[1])).astype(np.float32)
    return [np.resize(row, size) - lower for row in logits]


def found_on_a_card(values: NDArray[np.float32], sought: Sought, asked: list[int]) -> Candidates:
    """asked: gains an entry where all logits are."""
    floor = values.max() - np.float32(sought.depth)
    is_candidate = values >= floor
    deep = (values[~is_candidate].astype(np.float64) - values.max()) * sought.inverse_temperature

    def all_logits() -> torch.Tensor:
        asked.append(1)
        return torch.from_numpy(values)

    ids = np.flatnonzero(is_candidate)
    rest = float(np.exp(deep).sum())
    return Candidates(ids, values[ids], floor, rest, deep.size, all_logits)


def measure(name: str, params: SamplingParams, logits: list[NDArray[np.float32]]) -> None:
    whole, few, asked = Sampler(params), Sampler(params), list[int]()
    sought, times, counts = few.sought, (list[float](), list[float]()), list[int]()
    assert sought is not None
    too_many = 0
    for values in logits:
        row = torch.from_numpy(values)
        begin = time.perf_counter()
        expected = whole.sample(row)
        times[0].append(time.perf_counter() - begin)
        found = found_on_a_card(values, sought, asked)
        counts.append(found.ids.size)
        fits = found.ids.size <= CAPACITY
        too_many += not fits
        begin = time.perf_counter()
        token = few.sample_from(found) if fits else few.sample(row)
        times[1].append(time.perf_counter() - begin)
        assert token == expected, "the answer depends on the way"
    half, most = (int(np.quantile(counts, share)) for share in (0.5, 0.99))
    both = [f"{1e6 * statistics.median(each):5.0f}" for each in times]
    print(
        f"{name:38} all {both[0]} us, candidates {both[1]} us; {half} candidates, of 99 in 100 "
        f"at most {most}; all logits for {(too_many + len(asked)) / len(logits):.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--positions", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logits = rows(arguments.model, arguments.vocabulary, arguments.positions)
    print(f"{len(logits)} positions, {logits[0].size:,} tokens")
    for name, params in SETTINGS.items():
        measure(name, params, logits)


if __name__ == "__main__":
    main()
