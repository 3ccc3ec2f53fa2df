"""Runs one quantization again and again into the same place, killed before each step it takes on
the disk, until one run comes to its end.

A program of its own: it forks for every run, which only a process without threads may do.
Arguments: source, work directory. Prints one JSON line per run: how it ended and what is there.
"""

import json
import os
import signal
import sys
from pathlib import Path

from quant_steps import count_steps

from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

LIMIT = 500


def run_and_die(source: Path, out: Path, step: int) -> bool:
    """Whether the child was killed, by itself, before its `step`-th step."""

    def die(number: int, name: str) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            with count_steps(die) as open_file:
                quantize(source, out, Recipe.uniform(4, 32), open_file=open_file)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WIFSIGNALED(status)


def main() -> None:
    source, work = Path(sys.argv[1]), Path(sys.argv[2])
    out = work / "out"
    for step in range(LIMIT):
        killed = run_and_die(source, out, step)
        left = sorted(path.name for path in work.iterdir())
        print(json.dumps({"killed": killed, "left": left}), flush=True)
        if out.exists():
            out.rename(work.parent / "results" / str(step))
        if not killed:
            return


if __name__ == "__main__":
    main()
