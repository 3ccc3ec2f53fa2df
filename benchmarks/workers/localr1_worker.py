"""A child process that times localr1's forward pass on command (the same work as its peer's)."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels.native import NativeKernels
from localr1.models.registry import load_model
from localr1.models.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--isa", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = NativeKernels(threads=options.threads, isa=options.isa)
    with open_checkpoint(options.model) as checkpoint:
        model = load_model(checkpoint, kernels)
    cache = model.new_cache(options.context)
    print(json.dumps({"kernels": kernels.name}), flush=True)

    def decode(ids: list[int]) -> None:
        model.forward(Step(torch.tensor(ids, dtype=torch.int64), cache.length), cache)

    for line in sys.stdin:
        request = json.loads(line)
        cache.truncate(0)
        if request["prefix"]:
            decode(request["prefix"])
        begin = time.perf_counter()
        for ids in request["batches"]:
            decode(ids)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
