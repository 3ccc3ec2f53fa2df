"""`localr1 prune` and `localr1 paths`: what goes, what stays, and what is in use after all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import HubCache, add_quantized, model_files, run, safetensors

from localr1.cli.models import embedded_digest
from localr1.hub.library import Library
from localr1.hub.locks import blob_lock, model_lock, repository_lock
from localr1.hub.prune import leftovers, prune
from localr1.settings import Settings

ONE, TWO = "1" * 40, "2" * 40
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def kinds(settings: Settings) -> list[tuple[str, str]]:
    found = leftovers(Library.of(settings), settings.cache_dir, embedded_digest())
    return [(leftover.kind, leftover.of) for leftover in found]


def put(path: Path, data: bytes = b"x" * 4096) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def old(path: Path) -> Path:
    os.utime(path, (1e9, 1e9))
    return path


def test_a_transcript(settings: Settings, linked: HubCache) -> None:
    linked.add("org/good", model_files())
    mine = add_quantized(settings, "mine")
    blobs = linked.folder("org/good") / "blobs"
    gone = [
        put(settings.hub_cache / ".localr1-trash-01" / "x"),
        put(linked.folder("org/good") / ".localr1-trash-02" / "x"),
        put(blobs / f"{A}.localr1-partial"),
        put(blobs / f"{A}.localr1-blocks"),
        put(blobs / f"{B}.0123abcd.incomplete"),
        put(blobs / C),
        put(blobs / f"{B}.localr1-damaged"),
        put(mine.parent / ".localr1-trash-03" / "x"),
        put(mine.parent / ".yours.partial-0123abcd" / "x"),
        put(settings.cache_dir / "embedded" / "0123" / "r1-nano-int4" / "x"),
        old(put(settings.cache_dir / ".localr1-disk-abc")),
        old(put(settings.cache_dir / ".hardware.json.77.partial")),
    ]
    kept = [
        put(settings.cache_dir / "embedded" / embedded_digest() / "r1-nano-int4" / "x"),
        put(settings.cache_dir / "hardware.json"),
        put(settings.cache_dir / ".localr1-disk-new"),
        put(settings.state_dir / "chat_history"),
    ]
    assert kinds(settings) == [
        ("half deleted", ".localr1-trash-01"),
        ("half deleted", "org/good"),
        ("unfinished download", "org/good"),
        ("unfinished download", "org/good"),
        ("blob of no snapshot", "org/good"),
        ("damaged, moved aside", "org/good"),
        ("half deleted", ".localr1-trash-03"),
        ("unfinished quantization", "yours"),
        ("model of another version", "embedded/0123"),
        ("left by a measurement", ".localr1-disk-abc"),
        ("left by a measurement", ".hardware.json.77.partial"),
    ]
    code, stdout, stderr = run(settings, "prune", "--dry-run")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[0].split() == ["KIND", "OF", "SIZE"]
    assert len(stdout.splitlines()) == 12
    assert all(path.exists() for path in [*gone, *kept])
    code, _, stderr = run(settings, "prune")
    assert code == 2
    assert "Give -y" in stderr
    assert all(path.exists() for path in [*gone, *kept])
    code, _, stderr = run(settings, "prune", "-y")
    assert code == 0
    assert stderr == "Deleted 48.0 KiB.\n"
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    good = {model.name: model.is_complete for model in Library.of(settings).models()}
    assert good == {"mine": True, "org/good": True}
    assert run(settings, "prune", "-y") == (0, "", "Nothing to delete.\n")


def test_json(settings: Settings, linked: HubCache) -> None:
    linked.add("org/m", model_files())
    blob = put(linked.folder("org/m") / "blobs" / C)
    expected = {"kind": "blob of no snapshot", "of": "org/m", "bytes": 4096, "paths": [str(blob)]}
    for arguments, deleted in ((["--dry-run"], False), (["-y"], True)):
        code, stdout, _ = run(settings, "prune", "--json", *arguments)
        assert code == 0
        assert json.loads(stdout) == [{**expected, "deleted": deleted}]
    assert json.loads(run(settings, "prune", "--json")[1]) == []


def test_an_unfinished_pull_goes_with_its_finished_blobs(
    settings: Settings, linked: HubCache
) -> None:
    files = model_files()
    linked.add("org/m", files, commit=ONE, revisions=[])
    linked.pull_record("org/m", files, ONE)
    snapshot = linked.folder("org/m") / "snapshots" / ONE
    for path in snapshot.iterdir():
        path.unlink()  # The blobs are there, the snapshot is not made yet.
    assert kinds(settings) == [("unfinished download", "org/m")]
    assert run(settings, "prune", "-y")[0] == 0
    assert not list((linked.folder("org/m") / "blobs").iterdir())
    assert not (linked.folder("org/m") / "localr1-pull.json").exists()


def test_what_a_snapshot_uses_stays(settings: Settings, cache: HubCache) -> None:
    """Also of a snapshot that no revision means, and of one that is no language model."""
    cache.add("org/m", model_files(), commit=ONE, revisions=[])
    cache.add("org/encoder", {"config.json": b"{}", "model.safetensors": safetensors()})
    assert kinds(settings) == []


def test_a_shared_blob_that_only_an_orphan_leads_to(settings: Settings, linked: HubCache) -> None:
    shard = "model-00001-of-00002.safetensors"
    for repository in ("org/a", "org/b"):
        linked.add(repository, model_files(), shared=[shard], commit=ONE)
    (linked.folder("org/a") / "snapshots" / ONE / shard).unlink()
    (payload,) = (settings.hub_cache / "blobs").glob("??/" + "?" * 64)
    assert kinds(settings) == [("blob of no snapshot", "org/a")]
    assert run(settings, "prune", "-y")[0] == 0
    assert payload.exists()
    (linked.folder("org/b") / "snapshots" / ONE / shard).unlink()
    assert run(settings, "prune", "-y")[0] == 0
    assert not payload.exists()


HOLD = """
import contextlib, sys, time
from pathlib import Path
from localr1.hub.locks import held
with contextlib.ExitStack() as stack:
    for path in sys.argv[1:]:
        stack.enter_context(held(Path(path), "it"))
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_is_in_use_stays(settings: Settings, linked: HubCache) -> None:
    """A pull, another program's download, a quantization."""
    linked.add("org/pulled", model_files())
    linked.add("org/theirs", model_files())
    mine = settings.data_dir / "models" / "mine"
    used = [
        put(linked.folder("org/pulled") / "blobs" / f"{A}.localr1-partial"),
        put(linked.folder("org/theirs") / "blobs" / f"{B}.0123abcd.incomplete"),
        put(linked.folder("org/theirs") / "blobs" / C),
        put(mine.parent / ".mine.partial-0123abcd" / "x"),
    ]
    locks = [
        repository_lock(linked.folder("org/pulled")),
        blob_lock(linked.folder("org/theirs"), B),
        blob_lock(linked.folder("org/theirs"), C),
        model_lock(mine),
    ]
    command = [sys.executable, "-c", HOLD, *map(str, locks)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        code, _, stderr = run(settings, "prune", "-y")
        assert code == 0
        assert stderr.count("in use, left as it is") == 4
        assert all(path.exists() for path in used)
    finally:
        holder.kill()
        holder.communicate()
    assert run(settings, "prune", "-y")[0] == 0
    assert not any(path.exists() for path in used)


def test_what_came_into_use_since_it_was_listed_stays(settings: Settings, linked: HubCache) -> None:
    """Between the question and the answer another program makes a snapshot of the blob."""
    files = model_files()
    linked.add("org/m", files, commit=ONE)
    snapshot = linked.folder("org/m") / "snapshots" / ONE
    link = snapshot / "model-00001-of-00002.safetensors"
    target = os.readlink(link)
    link.unlink()
    library = Library.of(settings)
    (leftover,) = leftovers(library, settings.cache_dir, embedded_digest())
    link.symlink_to(target)
    assert not prune(leftover, library)
    assert all(model.is_complete for model in library.models())


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_nothing_outside_is_deleted(settings: Settings, linked: HubCache, tmp_path: Path) -> None:
    outside = put(tmp_path / "outside" / "treasure")
    linked.add("org/m", model_files())
    (linked.folder("org/m") / "blobs" / C).symlink_to(outside)
    models = settings.data_dir / "models"
    models.mkdir(parents=True)
    (models / ".localr1-trash-99").symlink_to(outside.parent)
    (settings.cache_dir / "embedded").mkdir(parents=True)
    (settings.cache_dir / "embedded" / "0123").symlink_to(outside.parent)
    assert run(settings, "prune", "-y")[0] == 0
    assert kinds(settings) == []
    assert outside.exists()


def test_paths(settings: Settings, linked: HubCache) -> None:
    size = sum(map(len, model_files().values()))
    linked.add("org/m", model_files())
    put(settings.state_dir / "chat_history", b"x" * 10)
    code, stdout, _ = run(settings, "paths", "--json")
    assert code == 0
    places = json.loads(stdout)
    assert places == {
        "data": {"path": str(settings.data_dir), "exists": False, "bytes": 0},
        "hub_cache": {
            "path": str(settings.hub_cache),
            "exists": True,
            "bytes": size + len(ONE),  # The ref.
        },
        "state": {"path": str(settings.state_dir), "exists": True, "bytes": 10},
        "cache": {"path": str(settings.cache_dir), "exists": False, "bytes": 0},
    }
    lines = run(settings, "paths")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["data", "hub", "state", "cache"]
    assert str(settings.hub_cache) in lines[1]


@pytest.mark.skipif(sys.platform != "linux", reason="holes in files, counted by the system")
def test_sizes_are_those_on_the_disk(settings: Settings, linked: HubCache) -> None:
    linked.add("org/m", model_files())
    partial = linked.folder("org/m") / "blobs" / f"{A}.localr1-partial"
    with open(partial, "wb") as file:
        file.truncate(1 << 30)
    (leftover,) = json.loads(run(settings, "prune", "--dry-run", "--json")[1])
    assert leftover["bytes"] < 1 << 20
