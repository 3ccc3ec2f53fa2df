"""The Hub stand-in as a Hub: driven by the huggingface_hub client as it is, and by bare HTTP."""

import contextlib
import hashlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from hub_faults import Fault, before
from hub_messages import Answer, Content, Proceed, Request, ask, deliver
from hub_repositories import Blob, Repository, Token
from hub_server import HubServer
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

pytestmark = pytest.mark.usefixtures("hub_client")

NAME = "maker/model"
WEIGHTS = bytes(range(256)) * 8192
CONFIG = b'{"model_type": "qwen2"}\n'
FILES: dict[str, bytes] = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "nested/deep/vocab.txt": b"a\nb\n",
    "nested/names with space & 100%.txt": b"c",
}
CONFIG_SHA1 = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def repository() -> Repository:
    return Repository.of(NAME, FILES)


@pytest.fixture
def hub(repository: Repository) -> Iterator[HubServer]:
    with HubServer(repository) as server:
        yield server


def cdn_link(hub: HubServer, path: str = "model.safetensors") -> str:
    return get_hf_file_metadata(hf_hub_url(NAME, path, endpoint=hub.endpoint)).location


def test_model_info_names_sizes_and_hashes(hub: HubServer, repository: Repository) -> None:
    info = HfApi(endpoint=hub.endpoint).model_info(NAME, files_metadata=True)
    assert info.sha == repository.branches["main"]
    assert info.siblings is not None
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert set(files) == set(FILES)
    weights, config = files["model.safetensors"], files["config.json"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), WEIGHTS_SHA256)
    assert (config.size, config.blob_id, config.lfs) == (len(CONFIG), CONFIG_SHA1, None)
    repository.details = {"cardData": {"license": "mit"}}
    card = HfApi(endpoint=hub.endpoint).model_info(NAME).card_data
    assert card is not None
    assert card.license == "mit"
    bare = HfApi(endpoint=hub.endpoint).model_info(NAME).siblings
    assert bare is not None
    assert {sibling.size for sibling in bare} == {None}


def test_blobs_are_named_as_git_and_lfs_name_them(repository: Repository) -> None:
    """The first as `git hash-object` prints it, the second by the text of LFS's specification."""
    assert Blob(b"c\n").git_sha1 == "f2ad6c76f0115a6ba5b00456a849810e7ec0af20"
    files = repository.commits[repository.branches["main"]].files
    pointer = files["model.safetensors"].blob.lfs_pointer
    assert pointer.read(0, 200).decode() == (
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{WEIGHTS_SHA256}\nsize {len(WEIGHTS)}\n"
    )


@pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
def test_tree_comes_in_pages(repository: Repository, page_size: int) -> None:
    with HubServer(repository, page_size=page_size) as hub:
        api = HfApi(endpoint=hub.endpoint)
        entries = list(api.list_repo_tree(NAME, recursive=True))
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        folders = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
        top = [entry.path for entry in api.list_repo_tree(NAME)]
        inner = [entry.path for entry in api.list_repo_tree(NAME, "nested/deep")]
        assert len(hub.requests("tree")) >= len(entries) / page_size
    assert {path: file.size for path, file in files.items()} == {
        path: len(content) for path, content in FILES.items()
    }
    lfs = files["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (WEIGHTS_SHA256, len(WEIGHTS))
    assert files["config.json"].blob_id == CONFIG_SHA1
    assert sorted(folders) == ["nested", "nested/deep"]
    assert sorted(top) == ["config.json", "model.safetensors", "nested"]
    assert inner == ["nested/deep/vocab.txt"]


def test_file_metadata_of_lfs_and_git(hub: HubServer, repository: Repository) -> None:
    weights = get_hf_file_metadata(hf_hub_url(NAME, "model.safetensors", endpoint=hub.endpoint))
    assert (weights.etag, weights.size) == (WEIGHTS_SHA256, len(WEIGHTS))
    assert weights.commit_hash == repository.branches["main"]
    assert weights.location.startswith(hub.cdn_endpoint)
    assert weights.xet_file_data is None
    config = get_hf_file_metadata(hf_hub_url(NAME, "config.json", endpoint=hub.endpoint))
    assert (config.etag, config.size) == (CONFIG_SHA1, len(CONFIG))
    assert config.commit_hash == repository.branches["main"]
    assert "/api/resolve-cache/" in config.location
    # The CDN's own ETag looks like a sha256 and is not the file's.
    other = ask(weights.location)[1]["ETag"].strip('"')
    assert len(other) == 64
    assert other != WEIGHTS_SHA256


def test_snapshot_is_what_the_repository_holds(hub: HubServer, tmp_path: Path) -> None:
    folder = huggingface_hub.snapshot_download(
        NAME, endpoint=hub.endpoint, cache_dir=tmp_path, max_workers=2
    )
    for path, content in FILES.items():
        assert (Path(folder) / path).read_bytes() == content
        assert hub.fetched_bytes(path) == len(content)
    assert hub.fetched_bytes() == sum(map(len, FILES.values()))
    blobs = {path.name for path in (tmp_path / "models--maker--model" / "blobs").iterdir()}
    assert {CONFIG_SHA1, WEIGHTS_SHA256} < blobs
    hub.forget()
    huggingface_hub.snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert hub.fetched_bytes() == 0


def test_files_on_disk_with_and_without_sendfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "model.gguf").write_bytes(content)
    with HubServer(Repository.from_directory(NAME, tmp_path)) as hub:
        link = cdn_link(hub, "nested/model.gguf")
        assert ask(link)[2] == content
        monkeypatch.delattr(os, "sendfile", raising=False)
        assert ask(link)[2] == content
        assert ask(link, headers={"Range": "bytes=1048000-2100000"})[2] == content[1048000:2100001]
        assert hub.fetched_bytes("nested/model.gguf") == 2 * len(content) + 1052001


@pytest.mark.parametrize(
    ("wanted", "first", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=100-", 100, len(WEIGHTS)),
        ("bytes=-3", len(WEIGHTS) - 3, len(WEIGHTS)),
        ("bytes=10-99999999", 10, len(WEIGHTS)),
    ],
)
def test_ranges(hub: HubServer, wanted: str, first: int, stop: int) -> None:
    status, headers, body = ask(cdn_link(hub), headers={"Range": wanted})
    assert (status, body) == (206, WEIGHTS[first:stop])
    assert headers["Content-Range"] == f"bytes {first}-{stop - 1}/{len(WEIGHTS)}"
    assert hub.fetched_ranges("model.safetensors") == [(first, stop - 1)]
    assert hub.fetched_bytes("model.safetensors") == stop - first


class SmallBuffers(socket.socket):
    """A socket that takes 1000 bytes at a time, and no more than 2500."""

    def __init__(self) -> None:
        self.taken = b""
        super().__init__()

    def send(self, data: "ReadableBuffer", flags: int = 0) -> int:
        if len(self.taken) >= 2500:
            raise BrokenPipeError
        part = bytes(data)[: min(1000, 2500 - len(self.taken))]
        self.taken += part
        return len(part)


def test_what_was_not_sent_is_not_counted() -> None:
    counts: list[int] = []
    for content in (WEIGHTS[:2345], WEIGHTS[:4000]):
        counts.clear()
        with SmallBuffers() as connection, contextlib.suppress(BrokenPipeError):
            deliver(connection, Answer(200, {}, Content(Blob(content))), counts.append, Event())
        assert connection.taken == content[:2500]
        assert sum(counts) == len(connection.taken)
        assert counts[0] == len(content)  # Before it was sent: nobody has bytes that do not count.


def test_what_is_not_a_range_of_the_file(hub: HubServer) -> None:
    link = cdn_link(hub)
    status, headers, _ = ask(link, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")
    for wanted in ("bytes=0-1,5-6", "bytes=-", "lines=1-2"):
        assert ask(link, headers={"Range": wanted})[0] == 200
    etag = ask(link, "HEAD")[1]["ETag"]
    part = {"Range": "bytes=0-9"}
    assert ask(link, headers={**part, "If-Range": etag})[0] == 206
    assert ask(link, headers={**part, "If-Range": '"of another file"'})[0] == 200


def test_a_connection_serves_many_requests(hub: HubServer) -> None:
    parts = urlsplit(cdn_link(hub))
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    connection.connect()
    first = connection.sock
    for start in range(0, 100, 10):
        headers = {"Range": f"bytes={start}-{start + 9}"}
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        assert connection.getresponse().read() == WEIGHTS[start : start + 10]
    assert connection.sock is first  # http.client forgets a socket that the server will close.
    connection.close()


def test_token_stays_with_the_hub(repository: Repository, tmp_path: Path) -> None:
    with HubServer(repository, tokens={"hf_good": Token()}) as hub:
        for path in ("model.safetensors", "config.json"):
            hf_hub_download(NAME, path, endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_good")
        assert {request.authorized for request in hub.requests() if not request.on_cdn} == {True}
        assert {request.authorized for request in hub.requests() if request.on_cdn} == {False}
        ask(cdn_link(hub), headers={"Authorization": "Bearer hf_good"})
        assert hub.requests()[-1].authorized  # A client that leaks a token would be seen.


def test_old_links_to_the_cdn_expire(hub: HubServer) -> None:
    link = cdn_link(hub)
    assert ask(link)[0] == 200
    hub.expire_links()
    assert ask(link)[0] == 403
    assert ask(cdn_link(hub))[0] == 200


def test_without_a_cdn_files_come_from_where_they_are_asked_for(
    repository: Repository, tmp_path: Path
) -> None:
    with HubServer(repository, direct=True) as hub:
        for path, content in FILES.items():
            name = hf_hub_download(NAME, path, endpoint=hub.endpoint, cache_dir=tmp_path)
            assert Path(name).read_bytes() == content
        assert {request.on_cdn for request in hub.requests()} == {False}
        assert {request.kind for request in hub.requests()} == {"bytes"}


def test_xet_is_offered_when_asked_for(repository: Repository) -> None:
    with HubServer(repository, xet=True) as hub:
        url = hf_hub_url(NAME, "model.safetensors", endpoint=hub.endpoint)
        data = get_hf_file_metadata(url, endpoint=hub.endpoint).xet_file_data
        assert data is not None
        assert len(data.file_hash) == 64
        assert ask(data.refresh_route)[1]["X-Xet-Cas-Url"] == hub.cdn_endpoint


def test_commits_branches_and_tags(tmp_path: Path) -> None:
    repository = Repository.of(NAME, {"a.txt": b"one", "gone.txt": b"gone"})
    first = repository.branches["main"]
    repository.tags["v1"] = first
    second = repository.commit({"a.txt": b"two", "gone.txt": None})
    repository.commit({"a.txt": b""}, branch="refs/pr/1")
    with HubServer(repository) as hub:
        api = HfApi(endpoint=hub.endpoint)
        for revision, content in [
            ("main", b"two"), (second, b"two"), ("v1", b"one"), (first, b"one"), ("refs/pr/1", b"")
        ]:  # fmt: skip
            path = hf_hub_download(
                NAME, "a.txt", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path
            )
            assert Path(path).read_bytes() == content
        assert api.model_info(NAME, revision="v1").sha == first
        refs = api.list_repo_refs(NAME)
        assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
        with pytest.raises(RevisionNotFoundError):
            api.model_info(NAME, revision="v9")
        url = hf_hub_url(NAME, "gone.txt", endpoint=hub.endpoint)
        with pytest.raises(RemoteEntryNotFoundError) as caught:
            get_hf_file_metadata(url)
        assert caught.value.response.headers["X-Repo-Commit"] == second


def test_a_branch_moves_between_two_requests(hub: HubServer, repository: Repository) -> None:
    first = repository.branches["main"]
    hub.add(before(lambda: repository.commit({"config.json": b"{}"})), skip=1, count=1)
    url = hf_hub_url(NAME, "config.json", endpoint=hub.endpoint)
    assert get_hf_file_metadata(url).commit_hash == first
    moved = get_hf_file_metadata(url)
    assert moved.commit_hash == repository.branches["main"] != first
    assert moved.size == 2


def test_renamed_repositories_redirect(repository: Repository, tmp_path: Path) -> None:
    with HubServer(repository, moved={"old/name": NAME}) as hub:
        assert HfApi(endpoint=hub.endpoint).model_info("old/name", files_metadata=True).id == NAME
        path = hf_hub_download(
            "old/name", "model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path
        )
        assert Path(path).read_bytes() == WEIGHTS
        status, headers, _ = ask(f"{hub.endpoint}/old/name/resolve/main/config.json")
        assert (status, headers["Location"]) == (307, f"/{NAME}/resolve/main/config.json?")


def refusals(**changes: Any) -> Iterator[tuple[HubServer, Repository]]:
    repository = Repository.of(NAME, FILES)
    for name, value in changes.items():
        setattr(repository, name, value)
    tokens = {
        "hf_good": Token(accepted=frozenset({NAME}), private=frozenset({NAME})),
        "hf_not_accepted": Token(),
        "hf_no_scope": Token(accepted=frozenset({NAME}), reads_gated=False),
    }
    with HubServer(repository, tokens=tokens) as hub:
        yield hub, repository


def head(hub: HubServer, token: str | bool = False) -> int | None:
    url = hf_hub_url(NAME, "config.json", endpoint=hub.endpoint)
    return get_hf_file_metadata(url, token=token).size


def test_gated_repository_has_three_refusals() -> None:
    for hub, _ in refusals(gated="manual"):
        with pytest.raises(GatedRepoError, match="Please log in") as no_token:
            head(hub)
        assert no_token.value.response.status_code == 401
        with pytest.raises(GatedRepoError, match="not in the authorized list") as not_accepted:
            head(hub, "hf_not_accepted")
        assert not_accepted.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError, match="fine-grained token settings") as no_scope:
            head(hub, "hf_no_scope")
        assert no_scope.value.response.status_code == 403
        assert not isinstance(no_scope.value, GatedRepoError)
        assert head(hub, "hf_good") == len(CONFIG)
        # What there is may be seen by anybody.
        api = HfApi(endpoint=hub.endpoint)
        assert api.model_info(NAME).gated == "manual"
        assert len(list(api.list_repo_tree(NAME))) == 3
        with pytest.raises(GatedRepoError):
            api.auth_check(NAME)


def test_private_and_missing_repositories_look_the_same() -> None:
    """Over http the client does not make a RepositoryNotFoundError of the 401 without a code (its
    pattern asks for https): who pulls has to."""
    for hub, repository in refusals(private=True):
        for name in (NAME, "maker/missing"):
            with pytest.raises(HfHubHTTPError, match="Invalid username or password") as caught:
                HfApi(endpoint=hub.endpoint).model_info(name, token=False)
            assert caught.value.response.status_code == 401
            assert "X-Error-Code" not in caught.value.response.headers
            with pytest.raises(RepositoryNotFoundError):
                HfApi(endpoint=hub.endpoint).model_info(name, token="hf_not_accepted")
        assert HfApi(endpoint=hub.endpoint).model_info(NAME, token="hf_good").private
        repository.private, repository.disabled = False, True
        with pytest.raises(DisabledRepoError):
            head(hub)


def test_whoami_tells_whose_token_it_is_and_its_scope() -> None:
    for hub, _ in refusals():
        api = HfApi(endpoint=hub.endpoint)
        assert api.whoami("hf_good")["name"] == "tester"
        access = api.whoami("hf_no_scope")["auth"]["accessToken"]
        assert access["fineGrained"]["canReadGatedRepos"] is False
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami("hf_unknown")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
            head(hub, "hf_unknown")


def test_an_error_of_the_stand_in_does_not_pass_for_a_network_error(repository: Repository) -> None:
    def act(request: Request, proceed: Proceed) -> Answer:
        raise ZeroDivisionError

    def use() -> None:
        with HubServer(repository) as hub:
            hub.add(Fault("broken", act, ("info",)))
            with pytest.raises(http.client.RemoteDisconnected):
                ask(f"{hub.endpoint}/api/models/{NAME}")

    with pytest.raises(ZeroDivisionError):
        use()


def test_a_process_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "repositories" / NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    program = Path(__file__).with_name("hub_server.py")
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "repositories"), "--bytes-per-second", "4e6"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()
            started = time.monotonic()
            path = hf_hub_download(
                NAME, "model.safetensors", endpoint=endpoint, cache_dir=tmp_path / "cache"
            )
            assert time.monotonic() - started >= len(WEIGHTS) / 4e6
            assert Path(path).read_bytes() == WEIGHTS
        finally:
            process.terminate()
