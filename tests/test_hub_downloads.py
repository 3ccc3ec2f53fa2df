"""Unfinished downloads, as `localr1 list --partial` shows them."""

import json
import os
from pathlib import Path

import pytest
from hub_cache import HubCache, model_files, models, run, safetensors

from localr1.hub.partial import BLOCK, PartialFile
from localr1.settings import Settings

ONE = "1" * 40


def test_partial_downloads(settings: Settings, cache: HubCache) -> None:
    files = model_files()
    shard = "model-00002-of-00002.safetensors"
    there = {name: data for name, data in files.items() if name != shard}
    mine_snapshot = cache.add("org/mine", there, commit=ONE)
    cache.pull_record("org/mine", files, ONE, "v1")
    cache.add("org/theirs", {"config.json": files["config.json"]})
    (cache.folder("org/theirs") / "blobs" / f"{'a' * 64}.0123abcd.incomplete").write_bytes(b"1234")
    code, stdout, stderr = run(settings, "list", "--partial")
    assert code == 0
    done, total = (sum(map(len, each.values())) for each in (there, files))
    assert [line.split() for line in stdout.splitlines()] == [
        ["NAME", "DONE", "OF", "FILES", "BY"],
        ["org/mine@v1", f"{done}", "B", f"{total}", "B", "4/5", "localr1"],
        ["org/theirs", "4", "B", "?", "1", "another", "program"],
    ]
    assert "`localr1 prune`" in stderr
    mine, theirs = json.loads(run(settings, "list", "--partial", "--json")[1])
    assert (mine["done_bytes"], mine["total_bytes"]) == (done, total)
    assert theirs["partial_files"][0]["done_bytes"] == 4
    assert run(settings, "list", "--partial", "-q")[1] == "org/mine@v1\norg/theirs\n"
    if cache.links:  # What is whole counts once, also where its partial file was not removed.
        PartialFile(Path(os.path.realpath(mine_snapshot / "config.json")), 4).write(
            0, memoryview(b"1234")
        )
        mine = json.loads(run(settings, "list", "--partial", "--json")[1])[0]
        assert mine["done_bytes"] == done


def test_a_file_that_is_being_renamed_hides_nothing(
    settings: Settings, linked: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of a directory and the look at an entry a download renamed it."""
    snapshot = linked.add("org/m", model_files())
    listdir = os.listdir

    def listed_before(path: Path) -> list[str]:
        return listdir(path) + [".config.json.0123abcd"] * (Path(path) == snapshot)

    monkeypatch.setattr(os, "listdir", listed_before)
    assert models(settings)["org/m"].is_complete


def test_how_much_of_a_partial_file_is_there(settings: Settings, linked: HubCache) -> None:
    data = safetensors(8 << 20)
    linked.pull_record("org/m", {"model.safetensors": data}, ONE)
    (record,) = json.loads((linked.folder("org/m") / "localr1-pull.json").read_text())["files"]
    partial = PartialFile(linked.folder("org/m") / "blobs" / record["etag"], len(data))
    for index in (0, 3):
        partial.write(index, memoryview(data)[index * BLOCK : (index + 1) * BLOCK])
    partial.close()
    (download,) = json.loads(run(settings, "list", "--partial", "--json")[1])
    assert download["total_bytes"] == len(data)
    assert download["done_bytes"] == 2 * BLOCK


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"files": 3}', b'{"files": [1, {}]}'])
def test_a_damaged_record_of_a_pull(record: bytes, settings: Settings, cache: HubCache) -> None:
    cache.add("org/m", model_files())
    (cache.folder("org/m") / "localr1-pull.json").write_bytes(record)
    assert models(settings)["org/m"].is_complete
    assert run(settings, "list", "--partial")[0] == 0


def test_nothing_partial(settings: Settings) -> None:
    assert run(settings, "list", "--partial")[:2] == (0, "")
