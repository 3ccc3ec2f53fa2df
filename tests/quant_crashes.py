"""Quantizes into the same place again and again, killed before a random step it takes on the disk,
until it comes to its end; then in another place, until it was killed as often as was asked for.

A program of its own: it forks for every run, which only a process without threads may do.
Arguments: source, work directory, kills, seed, and "delete" for shards that are deleted on the way
(of a copy in each place; to delete one is a step as any other). Prints one JSON line per run: in
which place, how it ended and what was there then. The results stay in the work directory.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from quant_steps import count_steps

from localr1.quant.arrival import Arrival
from localr1.quant.deleting import DeletingArrival
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

RECIPE = Recipe.uniform(4, 32)
DELETES = sys.argv[5:] == ["delete"]


def in_child(run: Callable[[], None]) -> bool:
    """Whether the child was killed, by itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WIFSIGNALED(status)


def run_and_die(source: Path, out: Path, step: int) -> bool:
    """Whether it was killed before its `step`-th step; if not, it had fewer."""

    def die(number: int, name: str) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with count_steps(die) as open_file:
            quantize(source, out, RECIPE, arrival=arrival_of(source), open_file=open_file)

    return in_child(run)


def arrival_of(source: Path) -> Arrival | None:
    return DeletingArrival(source) if DELETES else None


def number_of_steps(source: Path, folder: Path) -> int:
    """Of a run that nothing interrupts."""
    last = folder / "steps"

    def run() -> None:
        steps = []
        with count_steps(lambda number, name: steps.append(name)) as open_file:
            quantize(
                source, folder / "out", RECIPE, arrival=arrival_of(source), open_file=open_file
            )
        last.write_text(str(len(steps)))

    assert not in_child(run)
    return int(last.read_text())


def source_in(folder: Path, source: Path) -> Path:
    """The source for runs in `folder`: a copy, if they use it up."""
    return shutil.copytree(source, folder / source.name) if DELETES else source


def main() -> None:
    source, work = Path(sys.argv[1]), Path(sys.argv[2])
    kills, chance = int(sys.argv[3]), random.Random(int(sys.argv[4]))
    (work / "undisturbed").mkdir(parents=True)
    steps = number_of_steps(source_in(work / "undisturbed", source), work / "undisturbed")
    place = 0
    while kills > 0:
        folder = work / str(place)
        folder.mkdir()
        own_source = source_in(folder, source)
        killed = True
        while killed and not (folder / "out").exists():
            killed = run_and_die(own_source, folder / "out", chance.randrange(steps))
            kills -= killed
            left = sorted(path.name for path in folder.iterdir())
            print(json.dumps({"place": place, "killed": killed, "left": left}), flush=True)
        place += 1


if __name__ == "__main__":
    main()
