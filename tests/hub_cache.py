"""A Hugging Face cache built by hand, as huggingface_hub lays it out, with or without links."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.errors import LocalR1Error
from localr1.hub.library import Library, LocalModel
from localr1.settings import Settings

LFS = (".safetensors", ".gguf")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}
INT4 = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
    }
}
SHARED_MARK = ".huggingface-shared-blobs"


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


def etag_of(name: str, data: bytes) -> str:
    """SHA-256 of what Git LFS keeps, git's SHA-1 of any other file."""
    if name.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def safetensors(nbytes: int = 64, fill: int = 1) -> bytes:
    """One tensor of so many bytes."""
    header = encoded({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}})
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * nbytes


def model_files(**config: object) -> dict[str, bytes]:
    """A small model in two shards."""
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    shards = {
        file: safetensors(64, number).replace(b'"w"', f'"{name}"'.encode())
        for number, (name, file) in enumerate(weight_map.items())
    }
    return {
        "config.json": encoded({**CONFIG, **config}),
        "tokenizer.json": encoded({"model": {}}),
        "model.safetensors.index.json": encoded({"metadata": {}, "weight_map": weight_map}),
        **shards,
    }


class HubCache:
    """links: False as on Windows without the right to make them: files lie in the snapshots."""

    def __init__(self, root: Path, *, links: bool = True) -> None:
        self.root = root
        self.links = links
        if links and os.name == "nt":
            pytest.skip("Windows makes links only where it is told to")

    def folder(self, repository: str) -> Path:
        return self.root / ("models--" + repository.replace("/", "--"))

    def add(
        self,
        repository: str,
        files: Mapping[str, bytes],
        *,
        commit: str = "",
        revisions: Sequence[str] = ("main",),
        shared: Sequence[str] = (),
    ) -> Path:
        """A snapshot. shared: names of files that lie in the store all repositories share."""
        folder = self.folder(repository)
        commit = commit or hashlib.sha1(repository.encode()).hexdigest()
        snapshot = folder / "snapshots" / commit
        for name, data in files.items():
            blob = folder / "blobs" / etag_of(name, data)
            blob.parent.mkdir(parents=True, exist_ok=True)
            entry = snapshot / name
            entry.parent.mkdir(parents=True, exist_ok=True)
            if not self.links:
                entry.write_bytes(data)
                continue
            if name in shared:
                self._share(blob, data)
            else:
                blob.write_bytes(data)
            if not entry.is_symlink():
                entry.symlink_to(os.path.relpath(blob, entry.parent))
        for revision in revisions:
            ref = folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
        return snapshot

    def _share(self, blob: Path, data: bytes) -> None:
        """As huggingface_hub 2: named by another hash, with a list of who links to it beside it."""
        key = hashlib.sha256(b"xet" + data).hexdigest()
        store = self.root / "blobs"
        payload = store / key[:2] / key
        payload.parent.mkdir(parents=True, exist_ok=True)
        (store / SHARED_MARK).write_text("1\n")
        payload.write_bytes(data)
        with open(payload.with_name(key + ".refs"), "a") as manifest:
            manifest.write(f"{blob.relative_to(self.root).as_posix()}\n")
        blob.symlink_to(os.path.relpath(payload, blob.parent))

    def pull_record(
        self, repository: str, files: Mapping[str, bytes], commit: str, revision: str = "main"
    ) -> None:
        """What an unfinished `localr1 pull` has written down."""
        self.folder(repository).mkdir(parents=True, exist_ok=True)
        (self.folder(repository) / "localr1-pull.json").write_bytes(
            encoded(
                {
                    "repository": repository,
                    "commit": commit,
                    "revision": revision,
                    "files": [
                        {"path": name, "size": len(data), "etag": etag_of(name, data)}
                        for name, data in files.items()
                    ],
                }
            )
        )


def add_quantized(settings: Settings, name: str, **source: str) -> Path:
    folder = settings.data_dir / "models" / name
    folder.mkdir(parents=True)
    files = model_files(**INT4)
    files["localr1.json"] = encoded({"version": 1, "source": {"name": "x", **source}})
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def run(settings: Settings, *arguments: str) -> tuple[int, str, str]:
    """A command line's exit code, stdout and stderr."""
    environment = {
        "LOCALR1_HOME": str(settings.data_dir.parent),
        "HF_HUB_CACHE": str(settings.hub_cache),
        "NO_COLOR": "1",
    }
    result = CliRunner().invoke(app, list(arguments), env=environment)
    if isinstance(result.exception, LocalR1Error):  # What main() makes of it.
        error = result.exception
        return error.exit_code, result.stdout, f"{result.stderr}error: {error}\n"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def models(settings: Settings) -> dict[str, LocalModel]:
    return {model.name: model for model in Library.of(settings).models()}
