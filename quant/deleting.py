"""A source that is used up: each shard is deleted when what is made of it is safe."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.index import SINGLE_NAME, indexed_files
from localr1.checkpoint.paths import hub_origin
from localr1.checkpoint.safetensors_file import LENGTH_BYTES
from localr1.errors import OutputError, UsageError
from localr1.hub.locks import held, repository_lock
from localr1.quant.arrival import HEADER_SUFFIX, LocalArrival
from localr1.quant.atomic import sync_directory


class DeletingArrival(LocalArrival):
    """The `Arrival` of a directory whose shards are deleted as they are released.

    In the place of each stays SHARD.localr1-header, by which an interrupted run finds its way,
    until `finish`. In the Hugging Face cache a shard is a link: it goes together with its blob.
    Files beside them that the model's index does not name stay.
    """

    releases = True

    def __init__(self, directory: Path) -> None:
        """Deletes nothing. Raises as LocalArrival, and UsageError for shards that must not be
        deleted: links elsewhere, and blobs that another snapshot has too."""
        no_shards = UsageError(
            f"{directory}", expected="a directory of safetensors, whose shards can be deleted"
        )
        if directory.is_file():
            raise no_shards
        super().__init__(directory)
        if not self._paths and not self._headers:
            raise no_shards
        names = indexed_files(self.root)
        if SINGLE_NAME in self._paths:  # Goes before an index.
            names = {SINGLE_NAME}
        self.to_delete = {name: path for name, path in self._paths.items() if name in names}
        """Shards that are there, and the files they are."""
        for name, real in self.to_delete.items():
            self._check(name, real)

    def release(self, file_name: str) -> None:
        real = self.to_delete.get(file_name)
        if real is None:
            return
        try:
            if file_name not in self._headers:
                self._headers[file_name] = self._keep_header(file_name, real)
            real.unlink(missing_ok=True)
            (self.root / file_name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.directory / file_name} cannot be deleted",
                found=error.strerror or str(error),
                fix="What was made of it is kept: the same command goes on from there.",
            ) from error
        del self._paths[file_name], self.to_delete[file_name]

    def finish(self) -> None:
        """The result is there: what was kept of the shards goes too."""
        for name, path in self._headers.items():
            with contextlib.suppress(OSError):  # Small files that are in nobody's way.
                if name in self.gone:
                    (self.root / name).unlink(missing_ok=True)  # What a kill left of a link.
                path.unlink()

    def _keep_header(self, file_name: str, real: Path) -> Path:
        """Durable before its shard goes."""
        file = RandomAccessFile(real)
        try:
            start = file.read(0, LENGTH_BYTES)
            header = start + file.read(LENGTH_BYTES, int.from_bytes(start, "little"))
            content = header + str(file.size).encode()
        finally:
            file.close()
        path = self.root / (file_name + HEADER_SUFFIX)
        unfinished = path.with_name(f"{path.name}.partial")
        with open(unfinished, "wb") as written:
            written.write(content)
            written.flush()
            os.fsync(written.fileno())
        os.replace(unfinished, path)
        sync_directory(self.root)
        return path

    def _check(self, name: str, real: Path) -> None:
        path = self.root / name
        if not path.is_symlink():
            return
        if hub_origin(self.root) is None:
            raise UsageError(
                f"{self.directory / name}",
                expected="a file, which can be deleted",
                found=f"a link to {real}, which others may use",
                fix="Leave --delete-source-shards out.",
            )
        for other in self.root.parent.rglob("*"):
            if other != path and other.is_symlink() and Path(os.path.realpath(other)) == real:
                raise UsageError(
                    f"{self.directory / name}",
                    expected="a blob that no other file is a link to",
                    found=f"{other} beside it",
                    fix="Remove the other revision of the model first, or leave "
                    "--delete-source-shards out.",
                )


@contextlib.contextmanager
def source_held(directory: Path) -> Iterator[None]:
    """Nobody else downloads to, or removes from, the repository of the Hugging Face cache that
    `directory` is a snapshot of; of any other directory nothing is locked. Raises as `held`."""
    root = Path(os.path.realpath(directory))
    origin = hub_origin(root)
    if origin is None:
        yield
        return
    with held(repository_lock(root.parent.parent), origin.repository):
        yield
