"""The transfer against a Hub that misbehaves: the file comes whole, or an error says why not."""

import contextlib
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_faults import (
    LYING_SIZES,
    ODD_ETAGS,
    Fault,
    before,
    compressed,
    content_range,
    cut,
    etag,
    flip,
    html,
    ignore_range,
    listed_size,
    no_response,
    redirect,
    slow,
    stall,
    status,
    truncated_json,
)
from hub_repositories import Repository, Token
from hub_server import HubServer
from huggingface_hub import constants

from localr1.errors import (
    AccessError,
    HubError,
    LocalR1Error,
    NotFoundError,
    OutputError,
    UnreachableError,
)
from localr1.hub.downloads import read_pull
from localr1.hub.locks import held
from localr1.hub.partial import BLOCK, DATA_SUFFIX, JOURNAL_SUFFIX, PartialFile, done_bytes
from localr1.hub.pull import begin, fetch, finish_what_is_here, make_transfer, prepare
from localr1.hub.ranges import check_redirect
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub
from localr1.hub.transfer import RUN_BLOCKS, Patience, Totals

pytestmark = pytest.mark.usefixtures("hub_client")

NAME = "maker/model"
SHARD = "model.safetensors"
SIZE = 2 * RUN_BLOCKS * BLOCK // 16 + 12_345  # Several blocks, the last one short.
WEIGHTS = random.Random(1).randbytes(SIZE)
FILES = {"config.json": b"{}", "README.md": b"", SHARD: WEIGHTS}
HASTY = Patience(failures=4, first_delay=0.01, longest_delay=0.05, stall_seconds=1.0)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(Repository.of(NAME, FILES)) as hub:
        yield hub


def pull(server: HubServer, cache: Path, patience: Patience = HASTY, jobs: int = 4) -> Path:
    hub = Hub(server.endpoint)
    prepared = prepare(hub, Reference(NAME), cache, patience=patience)
    return fetch(prepared, hub, jobs=jobs, patience=patience)


def leftovers(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.name.endswith((DATA_SUFFIX, JOURNAL_SUFFIX))]


HARMLESS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "cut at once": (cut(0), {"count": 3}),
    "cut in a block": (cut(BLOCK + 7), {"count": 3}),
    "cut between blocks, each time": (cut(2 * BLOCK), {}),
    "reset": (cut(BLOCK // 2, reset=True), {"count": 3}),
    "stall": (stall(BLOCK + 1), {"count": 1}),
    "ranges ignored": (ignore_range(), {}),
    "ranges ignored once": (ignore_range(), {"count": 1}),
    "other range": (content_range(shift=1), {"count": 3}),
    "other total": (content_range(total=SIZE + 1), {"count": 3}),
    "no range": (content_range(text="bytes */*"), {"count": 2}),
    "bit flipped": (flip(SIZE // 2), {"count": 1}),
    "page": (html(), {"count": 2}),
    "no answer": (no_response(), {"count": 2}),
    "too busy": (status(429, retry_after="1"), {"count": 1}),
    "server error": (status(503), {"count": 3}),
    "gateway": (status(502, retry_after="a date"), {"count": 2}),
    "compressed": (compressed(), {}),
    **{f"etag {i}": (etag(value), {}) for i, value in enumerate(ODD_ETAGS)},
}


@pytest.mark.parametrize("fault", HARMLESS)
def test_the_file_comes_whole_all_the_same(fault: str, server: HubServer, tmp_path: Path) -> None:
    server.add(HARMLESS[fault][0], SHARD, **HARMLESS[fault][1])
    snapshot = pull(server, tmp_path)
    assert (snapshot / SHARD).read_bytes() == WEIGHTS
    assert (snapshot / "README.md").read_bytes() == b""
    assert leftovers(tmp_path) == []


FATAL: dict[str, tuple[Fault, type[LocalR1Error], str]] = {
    "always cut": (cut(BLOCK - 1), UnreachableError, "attempts failed"),
    "always flipped": (flip(SIZE // 2), HubError, "expected hash"),
    "always a page": (html(), UnreachableError, "not the Hub's"),
    "gone": (status(404), HubError, "404"),
    "always busy": (status(500), UnreachableError, "500"),
    "endless redirects": (redirect(), HubError, "redirect"),
    "another scheme": (redirect("file:///etc/passwd"), HubError, "file:"),
    "nowhere": (redirect("/nowhere"), HubError, "answered 404"),
}


@pytest.mark.parametrize("fault", FATAL)
def test_what_never_becomes_better_is_told(fault: str, server: HubServer, tmp_path: Path) -> None:
    planted, kind, text = FATAL[fault]
    server.add(planted, SHARD)
    with pytest.raises(kind, match=text):
        pull(server, tmp_path)
    assert not list(tmp_path.rglob(SHARD))
    # The rest is kept, and once the server is well all of it is there.
    server.remove_rules()
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
    assert leftovers(tmp_path) == []


def test_expired_addresses_are_asked_for_again(server: HubServer, tmp_path: Path) -> None:
    server.add(before(server.expire_links, "bytes"), SHARD, skip=1, count=1)
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS


def test_a_damaged_file_alone_is_fetched_again(server: HubServer, tmp_path: Path) -> None:
    server.add(flip(5), SHARD, count=1)
    pull(server, tmp_path)
    assert server.fetched_bytes(SHARD) == 2 * SIZE
    assert server.fetched_bytes("config.json") <= 2 * len(FILES["config.json"])


def interrupted(server: HubServer, cache: Path, after: int) -> None:
    """A pull that is left by an exception in its own thread, as Ctrl-C is one, once so many bytes
    are there."""

    def show(totals: Totals) -> None:
        if totals.done >= after:
            raise KeyboardInterrupt

    hub = Hub(server.endpoint)
    prepared = prepare(hub, Reference(NAME), cache, patience=HASTY)
    with pytest.raises(KeyboardInterrupt):
        fetch(prepared, hub, jobs=1, patience=HASTY, progress=show)


def test_an_interrupt_is_obeyed_in_a_second_and_resumed_from(
    server: HubServer, tmp_path: Path
) -> None:
    server.add(stall(3 * BLOCK), SHARD, count=1)
    began = time.monotonic()
    interrupted(server, tmp_path, after=3 * BLOCK)
    assert time.monotonic() - began < 5.0  # Of a stall that never ends.
    assert "localr1-transfer" not in [thread.name for thread in threading.enumerate()]
    (partial,) = (p for p in leftovers(tmp_path) if p.name.endswith(DATA_SUFFIX))
    assert done_bytes(partial) == 3 * BLOCK
    server.forget()
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
    assert server.fetched_bytes(SHARD) == SIZE - 3 * BLOCK


def test_blocks_that_were_lost_with_the_power_are_fetched_again(
    server: HubServer, tmp_path: Path
) -> None:
    server.add(stall(5 * BLOCK), SHARD, count=1)
    interrupted(server, tmp_path, after=5 * BLOCK)
    (partial,) = (p for p in leftovers(tmp_path) if p.name.endswith(DATA_SUFFIX))
    with open(partial, "r+b") as file:  # The journal's record reached the disk, the block did not.
        file.seek(2 * BLOCK)
        file.write(bytes(BLOCK))
    server.forget()
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
    assert server.fetched_bytes(SHARD) == SIZE - 4 * BLOCK


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, journal: journal.write_bytes(journal.read_bytes()[:100]),
        lambda data, journal: journal.write_bytes(b""),
        lambda data, journal: journal.write_bytes(b"x" * 4096),
        lambda data, journal: journal.unlink(),
        lambda data, journal: data.unlink(),
        lambda data, journal: data.write_bytes(data.read_bytes()[: BLOCK + 3]),
        lambda data, journal: data.write_bytes(b""),
    ],
)
def test_a_damaged_partial_file_costs_what_was_damaged(
    damage: Callable[[Path, Path], Any], server: HubServer, tmp_path: Path
) -> None:
    server.add(stall(4 * BLOCK), SHARD, count=1)
    interrupted(server, tmp_path, after=4 * BLOCK)
    data, journal = sorted(leftovers(tmp_path), key=lambda p: p.name.endswith(JOURNAL_SUFFIX))
    damage(data, journal)
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
    assert leftovers(tmp_path) == []


def test_the_journal_of_another_file_is_not_believed(tmp_path: Path) -> None:
    one = PartialFile(tmp_path / ("a" * 64), 3 * BLOCK)
    one.write(1, memoryview(bytes(BLOCK)))
    one.close()
    for old, new in (("a" * 64, "b" * 64),):
        for suffix in (DATA_SUFFIX, JOURNAL_SUFFIX):
            (tmp_path / (old + suffix)).rename(tmp_path / (new + suffix))
    other = PartialFile(tmp_path / ("b" * 64), 3 * BLOCK)
    assert other.resumed == frozenset()
    other.close()


def test_a_partial_file_that_is_a_link_is_not_written_through(
    server: HubServer, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    blobs = tmp_path / "cache" / "models--maker--model" / "blobs"
    blobs.mkdir(parents=True)
    link = blobs / (hashlib.sha256(WEIGHTS).hexdigest() + DATA_SUFFIX)
    link.symlink_to(victim)
    with pytest.raises(OutputError):
        pull(server, tmp_path / "cache")
    assert victim.read_bytes() == b"mine"


def test_a_full_disk_keeps_what_there_is(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = PartialFile.write

    def failing(self: PartialFile, index: int, block: memoryview) -> None:
        if index >= 6 and self.size == SIZE:
            with self._disk_errors():
                raise OSError(28, "No space left on device")
        written(self, index, block)

    with monkeypatch.context() as full:
        full.setattr(PartialFile, "write", failing)
        with pytest.raises(OutputError, match="No space left"):
            pull(server, tmp_path, jobs=1)
    server.forget()
    assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
    assert server.fetched_bytes(SHARD) <= SIZE - 6 * BLOCK


def test_progress_never_runs_backwards(server: HubServer, tmp_path: Path) -> None:
    server.add(flip(7), SHARD, count=2)
    seen: list[Totals] = []
    hub = Hub(server.endpoint)
    prepared = prepare(hub, Reference(NAME), tmp_path, patience=HASTY)
    fetch(prepared, hub, jobs=4, patience=HASTY, progress=seen.append)
    done = [totals.done for totals in seen]
    assert done == sorted(done)
    assert (done[-1], seen[-1].files_done) == (seen[-1].nbytes, len(FILES))


def test_several_ranges_of_one_file_at_once(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(4 * RUN_BLOCKS * BLOCK)
    with HubServer(Repository.of(NAME, {"config.json": b"{}", SHARD: data})) as server:
        server.add(slow(64 << 20), SHARD)
        assert (pull(server, tmp_path) / SHARD).read_bytes() == data
        assert server.most_at_once() >= 2
        assert server.fetched_bytes(SHARD) == len(data)


def test_no_more_is_held_than_may_be(tmp_path: Path) -> None:
    """Of what nobody waits for; and a file that somebody waits for comes in any case."""
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    files = {name: random.Random(name).randbytes(3 * BLOCK) for name in names}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"}
    with HubServer(Repository.of(NAME, files)) as server:
        hub = Hub(server.endpoint)
        prepared = prepare(hub, Reference(NAME), tmp_path, patience=HASTY)
        transfer = make_transfer(
            prepared, hub, prepared.missing, jobs=4, patience=HASTY, most_held=4 * BLOCK
        )
        transfer.start()
        transfer.wait(names[0])
        time.sleep(0.3)
        assert server.fetched_bytes(names[1]) == server.fetched_bytes(names[3]) == 0
        assert transfer.wait(names[3]).read_bytes() == files[names[3]]
        assert server.fetched_bytes(names[1]) == 0
        transfer.release(names[0])
        transfer.release(names[3])
        assert transfer.wait(names[1]).read_bytes() == files[names[1]]
        transfer.stop()


@pytest.mark.parametrize("size", LYING_SIZES)
def test_sizes_that_lie(size: Any, server: HubServer, tmp_path: Path) -> None:
    server.add(listed_size(SHARD, size))
    with pytest.raises(HubError):
        pull(server, tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("fault", [html(), truncated_json(20), no_response(), status(500)])
def test_answers_about_the_repository_that_are_none(
    fault: Fault, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub's own patience.
    server.add(replace(fault, kinds=("info", "tree")))
    with pytest.raises(UnreachableError, match=r"maker/model"):
        pull(server, tmp_path)


GATED = replace(Repository.of(NAME, FILES), gated="auto")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (None, "not logged in"),
        ("hf_stranger", "has not been let in"),
        ("hf_narrow", "your token may not read it"),
    ],
)
def test_three_ways_not_to_be_let_in(token: str | None, text: str, tmp_path: Path) -> None:
    tokens = {
        "hf_friend": Token.accepting([NAME]),
        "hf_stranger": Token(),
        "hf_narrow": replace(Token.accepting([NAME]), reads_gated=False),
    }
    with HubServer(GATED, tokens=tokens) as server:
        hub = Hub(server.endpoint, token=token)
        with pytest.raises(AccessError, match=text) as told:
            fetch(prepare(hub, Reference(NAME), tmp_path), hub, jobs=2, patience=HASTY)
        assert told.value.exit_code == 4
        friend = Hub(server.endpoint, token="hf_friend")
        snapshot = fetch(prepare(friend, Reference(NAME), tmp_path), friend, jobs=2)
        assert (snapshot / SHARD).read_bytes() == WEIGHTS
        # Nobody else's server is shown the token.
        assert not any(r.authorized for r in server.requests() if r.on_cdn)


def test_what_is_not_there(server: HubServer, tmp_path: Path) -> None:
    hub = Hub(server.endpoint)
    with pytest.raises(NotFoundError, match="knows no such model"):
        prepare(hub, Reference("maker/none"), tmp_path)
    with pytest.raises(NotFoundError, match="no such branch"):
        prepare(hub, Reference(NAME, "none"), tmp_path)


def test_a_branch_that_moves_meanwhile_changes_nothing(tmp_path: Path) -> None:
    repository = Repository.of(NAME, FILES)
    with HubServer(repository) as server:
        newer = {**FILES, SHARD: b"newer"}
        server.add(before(lambda: repository.commit(newer)), SHARD, count=1)
        assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS
        assert (pull(server, tmp_path) / SHARD).read_bytes() == b"newer"


@pytest.mark.parametrize(
    ("url", "target", "text"),
    [
        ("https://hub.example/x", "http://cdn.example/x", "without encryption"),
        ("https://hub.example/x", "https://127.0.0.1/x", "inside"),
        ("http://hub.example/x", "http://localhost:8080/x", "inside"),
        ("http://hub.example/x", "http://10.0.0.1/x", "inside"),
        ("http://hub.example/x", "http://[::1]/x", "inside"),
        ("http://hub.example/x", "http://169.254.169.254/latest", "inside"),
        ("http://hub.example/x", "ftp://cdn.example/x", "not an address of the web"),
        ("http://hub.example/x", "http://cdn.example:port/x", "not an address of the web"),
    ],
)
def test_redirects_that_are_not_followed(url: str, target: str, text: str) -> None:
    with pytest.raises(HubError, match=text):
        check_redirect(url, target)


def test_redirects_that_are_followed() -> None:
    check_redirect("https://hub.example/x", "https://cdn.example/y?signature=1")
    check_redirect("http://127.0.0.1:1/x", "http://localhost:2/x")
    check_redirect("http://192.168.1.5/x", "http://192.168.1.6/x")


@pytest.mark.parametrize("is_wrong", [False, True])
def test_what_plain_http_refuses_comes_as_huggingface_hub_fetches_it(
    is_wrong: bool, tmp_path: Path
) -> None:
    """Of a file on Xet storage; here its client takes plain HTTP as well, as no such storage is to
    be had, so the way there is tested and hf-xet itself is not."""
    with HubServer(Repository.of(NAME, FILES), xet=True) as server:
        server.add(status(403), SHARD, kind="bytes", count=2)
        if is_wrong:
            server.add(flip(9), SHARD)
        hub = Hub(server.endpoint)
        hub.has_custom_endpoint = False
        prepared = prepare(hub, Reference(NAME), tmp_path, patience=HASTY)
        if is_wrong:
            with pytest.raises(HubError, match="from Xet storage"):
                fetch(prepared, hub, jobs=1, patience=HASTY)
            assert not list((tmp_path / "models--maker--model" / "blobs").glob("?" * 64))
        else:
            snapshot = fetch(prepared, hub, jobs=1, patience=HASTY)
            assert (snapshot / SHARD).read_bytes() == WEIGHTS
            assert leftovers(tmp_path) == []


def test_no_other_means_with_an_endpoint_of_ones_own(tmp_path: Path) -> None:
    with HubServer(Repository.of(NAME, FILES), xet=True) as server:
        server.add(status(403), SHARD, kind="bytes", count=2)
        with pytest.raises(HubError, match="403"):
            pull(server, tmp_path, jobs=1)


@pytest.mark.parametrize("is_busy", [False, True])
def test_what_is_here_ends_no_other_pull(is_busy: bool, server: HubServer, tmp_path: Path) -> None:
    """The record of an unfinished pull is that of the process that holds the repository, if one
    does."""
    snapshot = pull(server, tmp_path)
    prepared = prepare(Hub(server.endpoint), Reference(NAME), tmp_path)
    begin(prepared)
    with held(prepared.cached.lock_path, NAME) if is_busy else contextlib.nullcontext():
        assert finish_what_is_here(prepared) == snapshot
    assert (read_pull(prepared.cached.path) is not None) == is_busy


def test_an_endpoint_that_is_set_to_nothing_is_the_usual_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "")
    hub = Hub()
    assert (hub.endpoint, hub.has_custom_endpoint) == ("https://huggingface.co", False)


def test_threads_are_gone_afterwards(server: HubServer, tmp_path: Path) -> None:
    pull(server, tmp_path)
    names = [thread.name for thread in threading.enumerate()]
    assert "localr1-transfer" not in names


def test_an_older_partial_of_another_commit_is_no_orphan(tmp_path: Path) -> None:
    repository = Repository.of(NAME, FILES)
    with HubServer(repository) as server:
        server.add(stall(3 * BLOCK), SHARD, count=1)
        interrupted(server, tmp_path, after=3 * BLOCK)
        repository.commit({**FILES, SHARD: WEIGHTS[::-1]})
        assert (pull(server, tmp_path) / SHARD).read_bytes() == WEIGHTS[::-1]
        assert leftovers(tmp_path) == []


def test_files_of_the_same_bytes_come_once(tmp_path: Path) -> None:
    files = {**FILES, "LICENSE": WEIGHTS[:3000], "LICENSE.txt": WEIGHTS[:3000]}
    with HubServer(Repository.of(NAME, files)) as server:
        snapshot = pull(server, tmp_path)
        assert (snapshot / "LICENSE").read_bytes() == (snapshot / "LICENSE.txt").read_bytes()
        assert server.fetched_bytes("LICENSE") + server.fetched_bytes("LICENSE.txt") == 3000


def test_a_system_without_links(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    files = {**FILES, "LICENSE": b"same", "LICENSE.txt": b"same"}
    with HubServer(Repository.of(NAME, files)) as other:
        snapshot = pull(other, tmp_path)
        assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == files
        other.forget()
        pull(other, tmp_path)
        assert other.fetched_bytes() == 0 or not other.requests(kind="bytes")


def test_what_a_killed_process_had_not_named_yet_is_removed(
    server: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "models--maker--model"
    folder.mkdir()
    left = folder / ".localr1-pull.json.0123abcd"
    left.write_bytes(b"{")
    pull(server, tmp_path)
    assert not left.exists()
