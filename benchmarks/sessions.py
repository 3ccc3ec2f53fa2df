"""Taking up a long conversation from disk, beside reading it anew; whether the bits are the same.

    python benchmarks/sessions.py MODEL --tokens 4000

What is timed is all that `localr1 chat --resume` does once the model is loaded: telling the model
by its files, reading the snapshot, checking every byte, filling the cache. The file was written
just before, so the system has it in memory; --drop-cache asks Linux to forget it first.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import torch

from localr1.checkpoint.fingerprint import fingerprint
from localr1.engine.engine import Engine
from localr1.load import load_engine
from localr1.models.step import Step
from localr1.quant.evaluate import read_text
from localr1.sessions.snapshot import Origin, read_snapshot, write_snapshot


def origin_of(engine: Engine) -> Origin:
    assert engine.path is not None
    return Origin(fingerprint(engine.path), engine.sequence.cache.form, engine.arithmetic)


def long_prompt(engine: Engine, count: int) -> list[int]:
    text = engine.tokenizer.encode(read_text(None))
    return (text * (count // len(text) + 1))[:count]


def next_logits(engine: Engine, token: int) -> torch.Tensor:
    """Of one token more, which is forgotten again."""
    sequence = engine.sequence
    length = sequence.cache.length
    logits = engine.model.forward(Step(torch.tensor([token]), length), sequence.cache)
    sequence.cache.truncate(length)
    return logits


def forget(path: Path) -> None:
    """Out of the system's memory (Linux)."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--drop-cache", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(load_engine(arguments.model, threads=arguments.threads)) as stayed,
    ):
        path = Path(folder) / "session.safetensors"
        ids = long_prompt(stayed, arguments.tokens)
        begin = time.perf_counter()
        stayed.read_ahead(ids, threading.Event())
        read = time.perf_counter() - begin
        hot = None if stayed.experts is None else stayed.experts.hot_set()
        begin = time.perf_counter()
        nbytes = write_snapshot(path, stayed.sequence, origin_of(stayed), hot)
        wrote = time.perf_counter() - begin
        expected = next_logits(stayed, ids[0])
        times = []
        for _ in range(arguments.repetitions):
            with closing(load_engine(arguments.model, threads=arguments.threads)) as engine:
                if arguments.drop_cache:
                    forget(path)
                begin = time.perf_counter()
                found = read_snapshot(path, engine.sequence, origin_of(engine))
                if isinstance(found, str):
                    raise SystemExit(found)
                if engine.experts is not None:
                    engine.experts.restore(found)
                times.append(time.perf_counter() - begin)
                same = torch.equal(next_logits(engine, ids[0]), expected)
                if not same or engine.sequence.ids != ids:
                    raise SystemExit("the bits are not the same")
    print(f"{len(ids):,} tokens, {nbytes / 2**20:.1f} MiB, written in {wrote:.2f} s")
    print(f"read anew in {read:.2f} s")
    print(f"taken up in {statistics.median(times):.3f} s (worst of {len(times)}: {max(times):.3f})")
    print("the next token's logits have the same bits")


if __name__ == "__main__":
    main()
