"""The library over what really arrives: huggingface_hub's own downloads and `localr1 pull`'s, from
the Hub stand-in."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_cache import model_files, run
from hub_repositories import Repository
from hub_server import HubServer

from localr1.hub.library import Library
from localr1.hub.pull import fetch, prepare
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub
from localr1.settings import Settings

pytestmark = pytest.mark.usefixtures("hub_client")

NAME = "maker/model"
SHARD = "model-00001-of-00002.safetensors"
FILES = {**model_files(), "README.md": b"---\nlicense: mit\n---\n"}
FETCHERS = ("localr1", "huggingface_hub")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(Repository.of(NAME, FILES)) as hub:
        yield hub


def fetch_with(program: str, server: HubServer, cache: Path) -> Path:
    if program == "localr1":
        hub = Hub(server.endpoint)
        return fetch(prepare(hub, Reference(NAME), cache), hub, jobs=2)
    folder = huggingface_hub.snapshot_download(NAME, cache_dir=cache, endpoint=server.endpoint)
    return Path(folder)


@pytest.mark.parametrize("program", FETCHERS)
def test_what_arrives_is_listed_good_and_removed(
    program: str, settings: Settings, server: HubServer
) -> None:
    snapshot = fetch_with(program, server, settings.hub_cache)
    (model,) = Library.of(settings).models()
    assert (model.name, model.path, model.is_complete) == (NAME, snapshot, True)
    assert model.revisions == ("main",)
    code, stdout, _ = run(settings, "verify", NAME, "--json")
    assert code == 0, stdout
    assert json.loads(stdout)["without_hash"] == []
    assert json.loads(run(settings, "prune", "--json", "--dry-run")[1]) == []
    assert run(settings, "rm", "-y", NAME)[0] == 0
    assert Library.of(settings).models() == []
    assert [each for each in os.listdir(settings.hub_cache) if each.startswith("models--")] == []


@pytest.mark.parametrize("program", FETCHERS)
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_only_the_damaged_file_is_fetched_again(
    name: str, program: str, settings: Settings, server: HubServer
) -> None:
    snapshot = fetch_with(program, server, settings.hub_cache)
    blob = Path(os.path.realpath(snapshot / name))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    code, stdout, _ = run(settings, "verify", NAME, "--json", "-y")
    document = json.loads(stdout)
    assert code == 1
    assert [each["file"] for each in document["findings"]] == [name]
    (aside,) = map(Path, document["moved_aside"])
    assert aside.read_bytes() == data
    server.forget()
    fetch_with("localr1", server, settings.hub_cache)
    fetched = {each: server.fetched_bytes(each) for each in FILES}
    times = 2 if name == "config.json" else 1  # It is read before, to choose by.
    assert fetched == {**dict.fromkeys(FILES, 0), name: times * len(FILES[name])}
    assert run(settings, "verify", NAME)[0] == 0
    assert run(settings, "prune", "-y")[0] == 0
    assert not aside.exists()
    assert run(settings, "verify", NAME)[0] == 0
