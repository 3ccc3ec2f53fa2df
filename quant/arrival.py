"""Where the shards of a source come from, and where they go: a directory, or a download underway.

`quantize` asks for each shard when it needs it (`wait`) and says when it does not any more
(`release`), so that source and result never lie on the disk at once.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from localr1.checkpoint.files import read_bounded
from localr1.checkpoint.index import ArrivingFile
from localr1.checkpoint.paths import HubOrigin, hub_origin, model_root, resolve
from localr1.checkpoint.safetensors_file import LENGTH_BYTES, MAX_HEADER_BYTES
from localr1.errors import FormatError, NotFoundError

HEADER_SUFFIX = ".localr1-header"
"""Put behind the name of a deleted shard, for the file that its header is kept in."""


class Arrival(Protocol):
    """The safetensors files of a source, by the names they have in its directory.

    The directory itself holds the small files (config.json, tokenizer.json, the index) from the
    start, and so does each ArrivingFile its header. All is used from one thread.
    """

    @property
    def files(self) -> Mapping[str, ArrivingFile]:
        """All of them, as they are before the first `wait`. Asked for once."""
        ...

    @property
    def origin(self) -> HubOrigin | None:
        """Goes into the manifest."""
        ...

    @property
    def releases(self) -> bool:
        """Whether a released shard is deleted: what was made of it is then kept after any error,
        and its room counts as free."""
        ...

    def wait(self, file_name: str) -> Path:
        """Blocks until the shard is whole and verified; returns where it lies now, which need not
        be where its header lay. Raises when it will not come, or the user has interrupted."""
        ...

    def release(self, file_name: str) -> None:
        """It is not needed any more, or never was: of the latter, those with a known SHA-256 are
        never waited for. Nothing of it is open. May be called again for a shard that is gone."""
        ...


class LocalArrival:
    """A directory whose shards are all there, but for those that an earlier run has deleted
    (deleting.py) when it had made what is to be made of them."""

    releases = False

    def __init__(self, directory: Path) -> None:
        """Raises NotFoundError, FormatError for links that lead elsewhere."""
        self.directory = directory
        self.root = model_root(directory)
        names = sorted(os.listdir(self.root))
        self._headers = {
            name.removesuffix(HEADER_SUFFIX): resolve(self.root, name)
            for name in names
            if name.endswith(f".safetensors{HEADER_SUFFIX}")
        }
        self._paths = {
            name: resolve(self.root, name)
            for name in names
            if name.endswith(".safetensors")
            # A link may be left of one that is gone.
            and not (name in self._headers and not os.path.exists(self.root / name))
        }

    @property
    def gone(self) -> list[str]:
        """The shards of which the header alone is there."""
        return [name for name in self._headers if name not in self._paths]

    @property
    def files(self) -> Mapping[str, ArrivingFile]:
        there = {
            name: ArrivingFile(path, path.stat().st_size, None, is_whole=True)
            for name, path in self._paths.items()
        }
        return there | {name: read_kept_header(self._headers[name]) for name in self.gone}

    @property
    def origin(self) -> HubOrigin | None:
        return hub_origin(self.root)

    def wait(self, file_name: str) -> Path:
        if file_name not in self._paths:
            raise NotFoundError(
                f"{self.directory / file_name} was deleted when it had been quantized",
                expected="the unfinished result that was made of it",
                found="none",
                fix="Download the model again.",
            )
        return self._paths[file_name]

    def release(self, file_name: str) -> None:
        return


def read_kept_header(path: Path) -> ArrivingFile:
    """What `SHARD.localr1-header` says of a shard that is gone: its header, then its size in
    decimal digits. Raises FormatError for anything else."""
    content = read_bounded(path, str(path), MAX_HEADER_BYTES + LENGTH_BYTES + 20)
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    if not content[end:].isdigit():
        raise FormatError(f"{path}", expected="the header of a shard, then its size in digits")
    return ArrivingFile(path, int(content[end:]), None, is_whole=False)
