"""Downloads that are killed, and Hubs that flip bits: a few trials, and all of them in the soak."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_faults import flip, slow
from hub_messages import Request
from hub_repositories import Repository
from hub_server import HubServer

from localr1.hub.partial import BLOCK, DATA_SUFFIX, JOURNAL_SUFFIX, done_bytes
from localr1.hub.pull import fetch, prepare
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub

NAME = "maker/sharded"
NUM_SHARDS = 6
SHARD_BYTES = 12 * BLOCK + 777
JOBS = 4
"""Of pull_child.py."""
BYTES_PER_SECOND = 6 << 20
"""Of each connection, so that a kill finds all of them at work."""

SHARDS = {
    f"model-{i:05}-of-{NUM_SHARDS:05}.safetensors": random.Random(i).randbytes(SHARD_BYTES)
    for i in range(1, NUM_SHARDS + 1)
}
INDEX = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(SHARDS)}}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}" * 1000,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **SHARDS,
}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(Repository.of(NAME, FILES)) as hub:
        yield hub


def start(server: HubServer, cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cache / "home"),
    }
    program = str(Path(__file__).parent / "pull_child.py")
    return subprocess.Popen(
        [sys.executable, program, server.endpoint, NAME, str(cache)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def on_disk(cache: Path) -> int:
    """Bytes of shards that are there, finished or by a journal."""
    blobs = cache / "models--maker--sharded" / "blobs"
    whole = [path for path in blobs.glob("*") if path.stat().st_size == SHARD_BYTES]
    return sum(
        done_bytes(path) if path.name.endswith(DATA_SUFFIX) else SHARD_BYTES for path in whole
    )


def check_result(cache: Path) -> None:
    (snapshot,) = (cache / "models--maker--sharded" / "snapshots").iterdir()
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    left = [
        path
        for path in (cache / "models--maker--sharded").rglob("*")
        if path.name.endswith((DATA_SUFFIX, JOURNAL_SUFFIX, ".json"))
        and "snapshots" not in path.parts
    ]
    assert left == []
    blobs = list((cache / "models--maker--sharded" / "blobs").iterdir())
    assert len(blobs) == len(FILES)


def kill_again_and_again(server: HubServer, tmp_path: Path, kills: int) -> None:
    """Every run is killed somewhere in its download, until one has had all its kills; then one is
    let through. What a run asked for must be what was missing, and no run may lose more than the
    blocks its connections were at."""
    server.add(slow(BYTES_PER_SECOND), "*.safetensors")
    rng = random.Random(kills)
    killed, number = 0, 0
    while killed < kills:
        cache = tmp_path / str(number)
        number += 1
        before = 0
        while killed < kills:
            server.forget()
            child = start(server, cache)
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.5))
            is_over = child.poll() is not None
            child.kill()
            child.wait()
            after = on_disk(cache)
            assert after >= before
            # Each byte once: what a killed run had asked for may reach the server only now.
            asked = sum(covered(server.fetched_ranges(name)) for name in SHARDS)
            assert asked <= len(SHARDS) * SHARD_BYTES - before
            received = sum(min(r.bytes_sent, SHARD_BYTES) for r in shard_requests(server))
            # Besides the blocks, what lay in the sockets: at these speeds less than a block.
            assert received - (after - before) <= JOBS * 2 * BLOCK
            if is_over:
                break
            killed += 1
            before = after
        child = start(server, cache)
        assert child.wait(timeout=120) == 0
        check_result(cache)


def covered(ranges: list[tuple[int, int]]) -> int:
    """Bytes of these ranges, first and last, of which some may overlap."""
    total = reached = 0
    for first, last in sorted(ranges):
        total += max(0, last + 1 - max(first, reached))
        reached = max(reached, last + 1)
    return total


def shard_requests(server: HubServer) -> list[Request]:
    return [request for request in server.requests(kind="bytes") if request.path in SHARDS]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_downloads_go_on(server: HubServer, tmp_path: Path) -> None:
    kill_again_and_again(server, tmp_path, kills=5)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_hundred_killed_downloads_go_on(server: HubServer, tmp_path: Path) -> None:
    kill_again_and_again(server, tmp_path, kills=100)


def flip_again_and_again(server: HubServer, tmp_path: Path, trials: int) -> None:
    """One bit of one file is wrong once: that file alone comes twice."""
    rng = random.Random(trials)
    hub = Hub(server.endpoint)
    for trial in range(trials):
        name = rng.choice(list(FILES))
        cache = tmp_path / str(trial)
        server.forget()
        server.remove_rules()
        rule = server.add(flip(rng.randrange(len(FILES[name]))), name, count=1)
        prepared = prepare(hub, Reference(NAME), cache)
        snapshot = fetch(prepared, hub, jobs=JOBS)
        assert rule.met == 1
        for other, content in FILES.items():
            assert (snapshot / other).read_bytes() == content
            if other in SHARDS:
                assert server.fetched_bytes(other) == len(content) * (2 if other == name else 1)
        for path in (cache / "models--maker--sharded" / "blobs").iterdir():
            path.unlink()


@pytest.mark.usefixtures("hub_client")
def test_flipped_bits_are_caught(server: HubServer, tmp_path: Path) -> None:
    flip_again_and_again(server, tmp_path, trials=10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("hub_client")
def test_a_thousand_flipped_bits_are_caught(server: HubServer, tmp_path: Path) -> None:
    flip_again_and_again(server, tmp_path, trials=1000)
