"""What the stand-in does wrong when told to, seen in bare HTTP; and what the huggingface_hub client
makes of it, which is why localr1 transfers and checks by itself."""

import hashlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from hub_faults import (
    HOSTILE_PATHS,
    LYING_SIZES,
    ODD_ETAGS,
    compressed,
    content_range,
    cut,
    etag,
    flip,
    header,
    html,
    ignore_range,
    listed_as,
    listed_size,
    no_response,
    redirect,
    slow,
    stall,
    status,
    truncated_json,
)
from hub_messages import ask
from hub_repositories import Repository
from hub_server import HubServer
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

pytestmark = pytest.mark.usefixtures("hub_client")

NAME = "maker/model"
WEIGHTS = bytes(range(251)) * 8192
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(Repository.of(NAME, FILES)) as server:
        yield server


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def file_url(hub: HubServer, path: str = "model.safetensors") -> str:
    return hf_hub_url(NAME, path, endpoint=hub.endpoint)


def cdn_link(hub: HubServer) -> str:
    return ask(file_url(hub), "HEAD")[1]["Location"]


def download(hub: HubServer, cache: Path, path: str = "model.safetensors") -> bytes:
    name = hf_hub_download(NAME, path, endpoint=hub.endpoint, cache_dir=cache)
    return Path(name).read_bytes()


def read_until_cut(link: str) -> tuple[bytes, Exception]:
    parts = urlsplit(link)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    connection.request("GET", f"{parts.path}?{parts.query}")
    response = connection.getresponse()
    body = b""
    try:
        while chunk := response.read1():
            body += chunk
        response.read()
    except (OSError, http.client.HTTPException) as error:
        return body, error
    finally:
        connection.close()
    raise AssertionError(f"{len(body)} bytes and an orderly end")


@pytest.mark.parametrize("at", [0, 1, 4096, 1 << 20, len(WEIGHTS) - 1])
def test_cut_sends_so_many_bytes(hub: HubServer, at: int) -> None:
    hub.add(cut(at))
    link = cdn_link(hub)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(link)
    assert caught.value.partial == WEIGHTS[:at]
    assert hub.fetched_bytes("model.safetensors") == at
    assert hub.requests("bytes")[-1].faults == [f"cut at {at}"]


def test_reset(hub: HubServer) -> None:
    hub.add(cut(1 << 20, reset=True))
    body, error = read_until_cut(cdn_link(hub))
    assert isinstance(error, ConnectionResetError)
    assert WEIGHTS.startswith(body)


@pytest.mark.usefixtures("_hasty")
def test_client_continues_from_its_last_whole_10_mib_within_one_call(tmp_path: Path) -> None:
    """What came after them is lost. Another process would begin with nothing."""
    content = bytes(11 << 20)
    with HubServer(Repository.of(NAME, {"model.safetensors": content})) as hub:
        hub.add(cut(len(content) - 1), count=1)
        assert download(hub, tmp_path) == content
        ranges = hub.fetched_ranges("model.safetensors")
        assert ranges == [(0, -1), (10 << 20, len(content) - 1)]
        assert hub.fetched_bytes("model.safetensors") == len(content) - 1 + (1 << 20)


def test_same_size_corruption_is_not_seen_by_the_client(hub: HubServer, tmp_path: Path) -> None:
    """It compares sizes alone: the wrong bytes stand under their sha256's name from then on, and
    are not fetched again. This is why localr1 hashes what it fetches."""
    hub.add(flip(1_234_567), count=1)
    content = download(hub, tmp_path)
    assert len(content) == len(WEIGHTS)
    assert content[:1_234_567] == WEIGHTS[:1_234_567]
    assert content[1_234_567] == WEIGHTS[1_234_567] ^ 1
    assert content[1_234_568:] == WEIGHTS[1_234_568:]
    blob = tmp_path / "models--maker--model" / "blobs" / WEIGHTS_SHA256
    assert hashlib.sha256(blob.read_bytes()).hexdigest() != WEIGHTS_SHA256
    hub.forget()
    assert download(hub, tmp_path) == content
    assert hub.fetched_bytes() == 0


def test_flip_is_met_only_by_who_asks_for_the_byte(hub: HubServer) -> None:
    rule = hub.add(flip(5000), count=1)
    link = cdn_link(hub)
    assert ask(link, headers={"Range": "bytes=0-4999"})[2] == WEIGHTS[:5000]
    assert ask(link, headers={"Range": "bytes=5001-"})[2] == WEIGHTS[5001:]
    assert rule.met == 0
    wrong = ask(link, headers={"Range": "bytes=4990-5009"})[2]
    assert wrong == WEIGHTS[4990:5000] + bytes([WEIGHTS[5000] ^ 1]) + WEIGHTS[5001:5010]
    assert rule.met == 1
    assert ask(link)[2] == WEIGHTS


def test_faults_combine_and_rules_choose(hub: HubServer) -> None:
    hub.add(flip(3))
    hub.add(cut(10), "*.safetensors", skip=1, count=2)
    hub.add(cut(0), "*.json", kind="bytes")
    link = cdn_link(hub)
    wrong = WEIGHTS[:3] + bytes([WEIGHTS[3] ^ 1]) + WEIGHTS[4:]
    assert ask(link)[2] == wrong
    for _ in range(2):
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(link)
        assert caught.value.partial == wrong[:10]
    assert ask(link)[2] == wrong
    hub.remove_rules()
    assert ask(link)[2] == WEIGHTS


def test_stall_sends_nothing_until_it_is_over(hub: HubServer) -> None:
    hub.add(stall(1000, seconds=0.5), count=1)
    started = time.monotonic()
    assert ask(cdn_link(hub))[2] == WEIGHTS
    assert time.monotonic() - started >= 0.5


@pytest.mark.usefixtures("_hasty")
def test_stall_for_ever_ends_with_the_server(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.add(stall(1 << 20), count=1)
    assert download(hub, tmp_path) == WEIGHTS
    assert hub.fetched_ranges("model.safetensors")[0] == (0, -1)
    assert hub.requests("bytes")[0].finished is None  # Still stalling: the fixture ends it.
    assert hub.requests("bytes")[0].bytes_sent == 1 << 20


def test_slow_is_no_quicker_than_told(hub: HubServer) -> None:
    hub.add(slow(100_000))
    started = time.monotonic()
    body = ask(cdn_link(hub), headers={"Range": "bytes=0-59999"})[2]
    assert body == WEIGHTS[:60_000]
    assert time.monotonic() - started >= 0.5


def test_range_ignored_and_content_range_wrong(hub: HubServer) -> None:
    link = cdn_link(hub)
    part = {"Range": "bytes=100-199"}
    hub.add(ignore_range(), count=1)
    code, headers, body = ask(link, headers=part)
    assert (code, body, headers["Content-Range"]) == (200, WEIGHTS, None)
    for fault, stated in [
        (content_range(shift=1), f"bytes 101-200/{len(WEIGHTS)}"),
        (content_range(total=7), "bytes 100-199/7"),
        (content_range(text="bytes */*"), "bytes */*"),
    ]:
        hub.add(fault, count=1)
        code, headers, body = ask(link, headers=part)
        assert (code, headers["Content-Range"], body) == (206, stated, WEIGHTS[100:200])


@pytest.mark.usefixtures("_hasty")
def test_client_starts_over_where_a_range_is_ignored(tmp_path: Path) -> None:
    content = bytes(11 << 20)
    with HubServer(Repository.of(NAME, {"model.safetensors": content})) as hub:
        hub.add(cut(len(content) - 1), count=1)
        hub.add(ignore_range(), skip=1)
        assert download(hub, tmp_path) == content
        assert hub.requests("bytes")[-1].headers["range"].startswith("bytes=10485760-")
        assert hub.fetched_bytes("model.safetensors") == 2 * len(content) - 1


def test_page_in_place_of_a_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add(html(), kind="bytes")
    with pytest.raises(OSError, match="Consistency check failed"):
        download(hub, tmp_path)
    hub.add(html(), kind="info")
    with pytest.raises(json.JSONDecodeError):
        HfApi(endpoint=hub.endpoint).model_info(NAME)


@pytest.mark.parametrize("code", [403, 429, 500, 502, 503])
def test_statuses_so_many_times(hub: HubServer, code: int) -> None:
    hub.add(status(code, retry_after="7"), count=2, kind="resolve")
    seen = [ask(file_url(hub), "HEAD") for _ in range(3)]
    assert [answer[0] for answer in seen] == [code, code, 302]
    assert [answer[1]["Retry-After"] for answer in seen] == ["7", "7", None]


def test_client_obeys_rate_limits(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.add(status(429, retry_after="7"), count=1)
    hub.add(status(429, rate_limit_reset=55), skip=1, count=1)
    entries = list(HfApi(endpoint=hub.endpoint).list_repo_tree(NAME))
    assert len(entries) == 2
    assert waits == [8, 56]  # It adds a second.


@pytest.mark.parametrize("value", ODD_ETAGS)
def test_odd_etags_arrive_as_they_are(hub: HubServer, value: str | None) -> None:
    hub.add(etag(value))
    answer = ask(file_url(hub), "HEAD")[1]
    assert (answer["ETag"], answer["X-Linked-Etag"]) == (value, value)
    assert ask(answer["Location"], "HEAD")[1]["ETag"] == value


def test_client_takes_any_etag_for_a_file_name(hub: HubServer) -> None:
    hub.add(etag('"../../climbs"'))
    assert get_hf_file_metadata(file_url(hub)).etag == "../../climbs"


def test_missing_commit_header(hub: HubServer, tmp_path: Path) -> None:
    hub.add(header("X-Repo-Commit", None))
    assert get_hf_file_metadata(file_url(hub)).commit_hash is None


def listed(hub: HubServer) -> list[str]:
    """The names in the tree, which are those in model_info too."""
    api = HfApi(endpoint=hub.endpoint)
    tree = [entry.path for entry in api.list_repo_tree(NAME, recursive=True)]
    siblings = api.model_info(NAME).siblings
    assert siblings is not None
    assert [sibling.rfilename for sibling in siblings] == tree
    return tree


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_hostile_names_reach_the_client(hub: HubServer, name: str) -> None:
    hub.add(listed_as("config.json", name))
    assert listed(hub) == [name, "model.safetensors"]


def test_duplicates_case_twins_and_absences(hub: HubServer) -> None:
    hub.add(listed_as("config.json", "config.json", "config.json", "Config.JSON"), count=2)
    assert listed(hub) == ["config.json", "config.json", "Config.JSON", "model.safetensors"]
    hub.add(listed_as("config.json"))
    assert listed(hub) == ["model.safetensors"]


@pytest.mark.parametrize("size", LYING_SIZES, ids=repr)
def test_sizes_that_lie(hub: HubServer, size: Any) -> None:
    hub.add(listed_size("model.safetensors", size))
    api = HfApi(endpoint=hub.endpoint)
    (found,) = (e for e in api.list_repo_tree(NAME) if e.path == "model.safetensors")
    siblings = api.model_info(NAME, files_metadata=True).siblings
    assert siblings is not None
    for entry in (found, siblings[1]):
        assert repr(getattr(entry, "size")) == repr(size)  # noqa: B009  # A folder has none.
        assert repr(getattr(entry, "lfs").size) == repr(size)  # noqa: B009


def test_redirects_nowhere(hub: HubServer, tmp_path: Path) -> None:
    hub.add(redirect(), count=30)
    with pytest.raises(Exception, match="Exceeded 20 redirects"):
        get_hf_file_metadata(file_url(hub))
    hub.remove_rules()
    hub.add(redirect("file:///etc/passwd"))
    with pytest.raises(Exception, match="protocol"):
        download(hub, tmp_path)


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_documents_that_end_early(hub: HubServer, kind: Any) -> None:
    hub.add(truncated_json(40))
    api = HfApi(endpoint=hub.endpoint)
    with pytest.raises(json.JSONDecodeError):
        _ = api.model_info(NAME) if kind == "info" else list(api.list_repo_tree(NAME))


def test_no_response(hub: HubServer) -> None:
    hub.add(no_response(), count=1)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(file_url(hub))
    assert ask(file_url(hub))[0] == 302


def test_compressed_answers_have_no_length(hub: HubServer, tmp_path: Path) -> None:
    hub.add(compressed())
    link = cdn_link(hub)
    asked = {"Range": "bytes=0-9", "Accept-Encoding": "gzip"}
    code, headers, _ = ask(link, headers=asked)
    assert (code, headers["Content-Length"], headers["Content-Encoding"]) == (200, None, "gzip")
    assert ask(link, headers={"Range": "bytes=0-9"})[0] == 206
    assert download(hub, tmp_path) == WEIGHTS


def test_refused_by_the_cdn(hub: HubServer, tmp_path: Path) -> None:
    hub.add(status(403), kind="bytes")
    with pytest.raises(HfHubHTTPError, match="403"):
        download(hub, tmp_path)


def test_most_at_once_counts_what_overlaps(hub: HubServer, tmp_path: Path) -> None:
    link = cdn_link(hub)
    ask(link)
    ask(link)
    assert hub.most_at_once() == 1
    hub.add(stall(1))
    parts = urlsplit(link)
    connections = [http.client.HTTPConnection(parts.hostname or "", parts.port) for _ in range(3)]
    for connection in connections:
        connection.request("GET", f"{parts.path}?{parts.query}")
    hub.wait_until(lambda hub: len(hub.requests("bytes")) == 5)
    assert hub.most_at_once() == 3
    for connection in connections:
        connection.close()
