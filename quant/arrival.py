"""Where the shards of a source come from, and where they go: a directory, or a download underway.

`quantize` asks for each shard when it needs it (`wait`) and says when it does not any more
(`release`), so that source and result never lie on the disk at once.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from localr1.checkpoint.index import ArrivingFile
from localr1.checkpoint.paths import HubOrigin, hub_origin, model_root, resolve


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
    """A directory whose shards are all there."""

    def __init__(self, directory: Path) -> None:
        self._root = model_root(directory)
        self._paths = {
            name: resolve(self._root, name)
            for name in sorted(os.listdir(self._root))
            if name.endswith(".safetensors")
        }

    @property
    def files(self) -> Mapping[str, ArrivingFile]:
        return {
            name: ArrivingFile(path, path.stat().st_size, None, is_whole=True)
            for name, path in self._paths.items()
        }

    @property
    def origin(self) -> HubOrigin | None:
        return hub_origin(self._root)

    @property
    def releases(self) -> bool:
        return False

    def wait(self, file_name: str) -> Path:
        return self._paths[file_name]

    def release(self, file_name: str) -> None:
        return
