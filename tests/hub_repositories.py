"""What a Hub stand-in holds: repositories with commits, branches and tags, and the tokens it knows.

Ids are as git and the Hub make them: a small file is named by its git blob sha1, a file kept in
LFS by its sha256. Nothing is hashed before somebody asks: a benchmark's file may be large.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, Self

LFS_SUFFIXES = frozenset({
    ".bin", ".ckpt", ".gguf", ".gz", ".h5", ".model", ".msgpack", ".npy", ".npz", ".onnx",
    ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip", ".zst",
})  # fmt: skip
"""Of .gitattributes in a new repository of the Hub, and what its uploader adds."""
LARGEST_GIT_FILE = 10_000_000
"""Bytes: a larger file of any name goes to LFS."""


@dataclass(frozen=True)
class Blob:
    """The bytes of a file, in memory or in a file on disk that nobody changes meanwhile."""

    source: bytes | Path

    @cached_property
    def size(self) -> int:
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.stat().st_size

    def read(self, start: int, length: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start : start + length]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(length)

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def git_sha1(self) -> str:
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False))

    @cached_property
    def lfs_pointer(self) -> "Blob":
        """What git itself stores of an LFS file."""
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return Blob(text.format(self.sha256, self.size).encode())

    @cached_property
    def xet_hash(self) -> str:
        """64 hex digits that are not the sha256, as the Hub's CDN sends them as its ETag."""
        return hashlib.sha256(b"xet" + bytes.fromhex(self.sha256)).hexdigest()

    def _digest(self, digest: "hashlib._Hash") -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with self.source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """path: as the repository names it, with slashes."""

    path: str
    blob: Blob

    @property
    def in_lfs(self) -> bool:
        suffix = PurePosixPath(self.path).suffix
        return suffix in LFS_SUFFIXES or self.blob.size > LARGEST_GIT_FILE

    @property
    def etag(self) -> str:
        """The name of the blob in a cache: sha256 in LFS, else the git blob sha1."""
        return self.blob.sha256 if self.in_lfs else self.blob.git_sha1


@dataclass(frozen=True)
class Commit:
    id: str
    files: Mapping[str, StoredFile]
    title: str


@dataclass
class Repository:
    """name: organisation/name. gated: who wants the files must have accepted a licence. private:
    seen only by tokens that name it. details: more of what model_info answers (cardData, tags)."""

    name: str
    gated: Literal[False, "auto", "manual"] = False
    private: bool = False
    disabled: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, files: Mapping[str, bytes | Path]) -> Self:
        """One commit on main that holds these files."""
        repository = cls(name)
        repository.commit(files)
        return repository

    @classmethod
    def from_directory(cls, name: str, directory: Path) -> Self:
        """One commit on main that holds every file below a directory; read when asked for."""
        files: dict[str, bytes | Path] = {}
        for folder, _, file_names in os.walk(directory):
            for file_name in file_names:
                path = Path(folder) / file_name
                files[path.relative_to(directory).as_posix()] = path
        return cls.of(name, files)

    def commit(
        self,
        changes: Mapping[str, bytes | Path | None],
        branch: str = "main",
        title: str = "Change",
    ) -> str:
        """Files added, replaced or (None) removed on top of a branch, which moves; its id."""
        parent = self.branches.get(branch, "")
        files = dict(self.commits[parent].files) if parent else {}
        for path, source in changes.items():
            if source is None:
                del files[path]
            else:
                files[path] = StoredFile(path, Blob(source))
        digest = hashlib.sha1(f"{self.name}\0{parent}\0{title}".encode(), usedforsecurity=False)
        for path, file in sorted(files.items()):
            # A file on disk is not read for this: its name and size stand for its bytes.
            identity = file.blob.git_sha1 if isinstance(file.blob.source, bytes) else "on disk"
            digest.update(f"\0{path}\0{file.blob.size}\0{identity}".encode())
        commit = Commit(digest.hexdigest(), dict(sorted(files.items())), title)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit.id

    def resolve(self, revision: str) -> Commit | None:
        """By branch, tag or whole commit id."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(commit)


@dataclass(frozen=True)
class Token:
    """A user's access token. accepted: gated repositories whose licence the user accepted.
    reads_gated: the scope a fine-grained token may lack. private: private repositories it sees."""

    user: str = "tester"
    accepted: frozenset[str] = frozenset()
    reads_gated: bool = True
    private: frozenset[str] = frozenset()

    @classmethod
    def accepting(cls, repositories: Iterable[str]) -> Self:
        return cls(accepted=frozenset(repositories))
