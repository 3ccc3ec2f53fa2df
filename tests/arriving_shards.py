"""A model in shards that arrive one after the other, as a download brings them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from quant_sources import save_source
from safetensors.torch import load_file, save_file

from localr1.checkpoint.index import ArrivingFile
from localr1.checkpoint.paths import HubOrigin
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe


def by_layer(name: str) -> str:
    """A shard for each layer, one for the embedding, one for the rest."""
    pieces = name.split(".")
    if "layers" in pieces:
        return f"layer-{pieces[pieces.index('layers') + 1]}"
    return "embedding" if "embed_tokens" in name else "rest"


def split(source: Path, folder: Path, shard_of: Callable[[str], str] = by_layer) -> Path:
    """The model `source` as `folder`, its tensors in the shards that `shard_of` names."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    shards: dict[str, list[str]] = {}
    for name in tensors:
        shards.setdefault(f"{shard_of(name)}.safetensors", []).append(name)
    for file_name, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file_name)
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Download:
    """An `Arrival` whose shards come when they are waited for, in a directory of its own.

    Until then each is a file of its full length with its header alone, under another name. events:
    what was asked, in order: ("wait", shard) and ("release", shard). ahead: shards that come before
    any is waited for. A released shard is deleted.
    """

    releases = True
    origin: HubOrigin | None = None

    def __init__(self, complete: Path, work: Path, ahead: Collection[str] = ()) -> None:
        """complete: a directory of all shards, which stays as it is. work: is made, and filled with
        the small files: the source to give to `quantize` with this."""
        shutil.copytree(complete, work, ignore=shutil.ignore_patterns("*.safetensors"))
        self.work = work
        self.events: list[tuple[str, str]] = []
        self._blobs = work.parent / f"{work.name}-blobs"
        self._blobs.mkdir()
        self._content = {path.name: path.read_bytes() for path in complete.glob("*.safetensors")}
        for name, content in self._content.items():
            header_bytes = 8 + int.from_bytes(content[:8], "little")
            hollow = content[:header_bytes] + bytes(len(content) - header_bytes)
            self._partial(name).write_bytes(hollow)
        for name in ahead:
            self._complete(name)

    @property
    def files(self) -> dict[str, ArrivingFile]:
        return {
            name: ArrivingFile(
                self._blob(name) if self._blob(name).exists() else self._partial(name),
                len(content),
                hashlib.sha256(content).hexdigest(),
                is_whole=self._blob(name).exists(),
            )
            for name, content in self._content.items()
        }

    def wait(self, file_name: str) -> Path:
        self.events.append(("wait", file_name.removesuffix(".safetensors")))
        if not self._blob(file_name).exists():
            self._complete(file_name)
        return self._blob(file_name)

    def release(self, file_name: str) -> None:
        self.events.append(("release", file_name.removesuffix(".safetensors")))
        self._blob(file_name).unlink(missing_ok=True)
        self._partial(file_name).unlink(missing_ok=True)

    def _complete(self, name: str) -> None:
        self._partial(name).write_bytes(self._content[name])
        self._partial(name).rename(self._blob(name))

    def _blob(self, name: str) -> Path:
        return self._blobs / name.replace(".safetensors", ".blob")

    def _partial(self, name: str) -> Path:
        return self._blobs / name.replace(".safetensors", ".blob.localr1-partial")


def three_shards(folder: Path) -> Path:
    """A dense model of three layers, a shard for each, below an empty folder."""
    save_source(folder / "whole", num_hidden_layers=3)
    return split(folder / "whole", folder / "complete")


def quantized(source: Path, out: Path, recipe: Recipe) -> Path:
    """What an uninterrupted run makes of it."""
    quantize(source, out, recipe)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
