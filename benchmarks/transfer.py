"""`localr1 pull`'s transfer beside curl, of the same bytes from the same server on loopback.

    python benchmarks/transfer.py --directory /dev/shm --gib 2 --repetitions 7

curl writes each file as it comes, over one connection; the transfer journals every block, hashes
all of it with SHA-256 and waits for the disk (fsync), over --jobs connections. They take turns.
--directory: where both write; memory (tmpfs) leaves the disk out of it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from localr1.hub.pull import fetch, prepare
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub, Listing

SERVER = Path(__file__).resolve().parent.parent / "tests" / "hub_server.py"
NAME = "bench/model"


def write_files(folder: Path, gib: float, num_files: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number in range(num_files):
        with open(folder / f"model-{number:05}.safetensors", "wb") as file:
            for _ in range(int(gib * 1024 / num_files)):
                file.write(os.urandom(1 << 20))


def time_curl(hub: Hub, listing: Listing, folder: Path) -> float:
    folder.mkdir()
    urls = [hub.locate(listing, file).url for file in listing.files]
    began = time.perf_counter()
    arguments = [item for i, url in enumerate(urls) for item in ("-o", str(folder / str(i)), url)]
    subprocess.run(["curl", "-sSf", *arguments], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def time_transfer(hub: Hub, folder: Path, jobs: int) -> float:
    pull = prepare(hub, Reference(NAME), folder)
    began = time.perf_counter()
    fetch(pull, hub, jobs=jobs)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="transfer-", dir=arguments.directory))
    server = None
    try:
        write_files(work / "repositories" / NAME, arguments.gib, arguments.files)
        server = subprocess.Popen(
            [sys.executable, str(SERVER), str(work / "repositories")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        hub = Hub(server.stdout.readline().strip())
        listing = hub.listing(Reference(NAME))
        nbytes = sum(file.size for file in listing.files)
        ratios = []
        for repetition in range(arguments.repetitions):
            theirs = time_curl(hub, listing, work / "curl")
            ours = time_transfer(hub, work / "cache", arguments.jobs)
            ratios.append(theirs / ours)
            print(
                f"{repetition}: curl {nbytes / theirs / 1e9:.2f} GB/s, "
                f"localr1 {nbytes / ours / 1e9:.2f} GB/s, ratio {ratios[-1]:.2f}",
                flush=True,
            )
        print(
            f"median ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}), load {os.getloadavg()[0]:.1f}"
        )
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
