"""How much of the memory's bandwidth decoding gets, of any model.

    python benchmarks/decode_bandwidth.py V2

In turns a plain read of memory, with as many threads, and a run of one token after another from an
empty cache. Bytes: of every matrix that a token goes through, with its share of the experts, and of
the cache at half of its final length. The share is taken pair by pair, its median printed.
"""

import argparse
import os
import statistics
from contextlib import closing
from pathlib import Path

from compare_mixture import bytes_per_token, cached_bytes
from experts import decode
from kernels import read_bandwidth

from localr1.cli.measure import random_ids
from localr1.load import load_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    count = arguments.generate
    nbytes = bytes_per_token(arguments.model) + cached_bytes(arguments.model, count // 2)
    shares, rates, plain = [], [], []
    with closing(load_engine(arguments.model, threads=arguments.threads)) as engine:
        ids = random_ids(engine.model.config.vocab_size, count)
        decode(engine, ids)
        for _ in range(arguments.repetitions):
            plain.append(read_bandwidth(arguments.threads, 3))
            rates.append(count / decode(engine, ids))
            shares.append(nbytes * rates[-1] / 1e9 / plain[-1])
    speed = statistics.median(rates)
    print(
        f"{speed:.2f} tok/s, {nbytes / 1e6:.0f} MB a token, {nbytes * speed / 1e9:.1f} GB/s; plain "
        f"read {statistics.median(plain):.1f} GB/s; share {statistics.median(shares):.0%} "
        f"({min(shares):.0%}-{max(shares):.0%}), {len(shares)} pairs"
    )


if __name__ == "__main__":
    main()
