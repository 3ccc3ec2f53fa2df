"""The Hub stand-in, driven by the huggingface_hub client as it is."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_repositories import Repository
from hub_server import HubServer
from huggingface_hub import HfApi

NAME = "maker/model"
WEIGHTS = bytes(range(256)) * 8192
FILES: dict[str, bytes | Path] = {
    "config.json": b'{"model_type": "qwen2"}\n',
    "model.safetensors": WEIGHTS,
    "nested/deep/vocab.txt": b"a\nb\n",
}


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The client may open connections (every test here names the endpoint) and has no token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def repository() -> Repository:
    return Repository.of(NAME, FILES)


@pytest.fixture
def hub(repository: Repository) -> Iterator[HubServer]:
    with HubServer(repository) as server:
        yield server


def test_model_info_names_sizes_and_hashes(hub: HubServer, repository: Repository) -> None:
    info = HfApi(endpoint=hub.endpoint).model_info(NAME, files_metadata=True)
    assert info.sha == repository.branches["main"]
    assert info.siblings is not None
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert set(files) == set(FILES)
    weights = files["model.safetensors"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    config = files["config.json"]
    content = FILES["config.json"]
    assert isinstance(content, bytes)
    assert config.lfs is None
    assert config.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_snapshot_is_what_the_repository_holds(hub: HubServer, tmp_path: Path) -> None:
    folder = huggingface_hub.snapshot_download(
        NAME, endpoint=hub.endpoint, cache_dir=tmp_path, max_workers=2
    )
    for path, content in FILES.items():
        assert (Path(folder) / path).read_bytes() == content
    assert hub.fetched_bytes("model.safetensors") == len(WEIGHTS)
    assert hub.fetched_bytes() == sum(
        len(content) for content in FILES.values() if isinstance(content, bytes)
    )
