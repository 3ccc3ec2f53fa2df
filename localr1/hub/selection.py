"""Which files of a repository make the model: weights as safetensors or one GGUF, and what
describes them. Pickles and programs are never among them, whatever is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

from localr1.checkpoint.strict_json import parse_object
from localr1.errors import HubError, NotFoundError, UnsupportedError, UsageError
from localr1.hub.repository import RemoteFile

INDEX_NAME: Final = "model.safetensors.index.json"
CONFIG_NAME: Final = "config.json"
MAX_INDEX_BYTES: Final = 64 << 20
DOCUMENTS: Final = frozenset(
    {
        CONFIG_NAME,
        INDEX_NAME,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "localr1.json",
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "USE_POLICY.md",
        "NOTICE",
    }
)
"""Licences come along: whoever has the weights must be able to read what he may do with them."""

PLAIN_SUFFIXES: Final = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".txt", ".md"})
"""Of what --include may add: weights without code, and text."""


@dataclass(frozen=True)
class Selection:
    """files: to fetch, documents first, then weights in the order of their names. weights: those of
    them that hold tensors."""

    files: tuple[RemoteFile, ...]

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if _is_weight(file.path))

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def documents_to_choose_by(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """What must be read before `select` can choose: index and config, where they are there."""
    return [file for file in files if file.path in (INDEX_NAME, CONFIG_NAME)]


def select(
    repository: str,
    files: Sequence[RemoteFile],
    index: bytes | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Selection:
    """index: the text of the index, None where there is none. include, exclude: shell patterns over
    paths; what is included comes besides the documents, in place of the weights chosen here.

    Raises NotFoundError where there are no weights, UnsupportedError where all are pickles or only
    a pattern can choose, UsageError for a pattern that fits nothing or asks for code, HubError for
    an index that names files which are not there.
    """
    by_path: dict[str, RemoteFile] = {}
    for file in files:
        if by_path.setdefault(file.path, file) is not file:
            raise HubError(f"{repository} lists {file.path} twice")
    chosen = {path for path in by_path if path in DOCUMENTS}
    chosen |= _included(by_path, include) if include else _weights(repository, by_path, index)
    for pattern in exclude:
        chosen = {path for path in chosen if not _fits(path, pattern)}
    spellings: dict[str, str] = {}
    for path in sorted(chosen):
        other = spellings.setdefault(path.casefold(), path)
        if other != path:
            raise HubError(f"{repository} has {other} and {path}, which are one file on some disks")
    order = sorted(chosen, key=lambda path: (_is_weight(path), path != CONFIG_NAME, path))
    return Selection(tuple(by_path[path] for path in order))


def _weights(repository: str, by_path: Mapping[str, RemoteFile], index: bytes | None) -> set[str]:
    if index is not None:
        return _indexed(repository, by_path, index)
    if "model.safetensors" in by_path:
        return {"model.safetensors"}
    top = {path for path in by_path if "/" not in path and path.endswith(".safetensors")}
    if top:
        return top
    gguf = sorted(path for path in by_path if path.endswith(".gguf"))
    if gguf:
        return _one_gguf(repository, by_path, gguf)
    pickles = [path for path in by_path if path.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise UnsupportedError(
            f"{repository}: its weights are pickles, which can run code when they are opened",
            expected="safetensors or GGUF",
            found=pickles[0],
            fix="Look for a revision or a copy with safetensors: many have a branch refs/pr/N.",
        )
    raise NotFoundError(
        f"{repository}: no weights are in it",
        expected="safetensors or GGUF files",
        found=f"{len(by_path)} other files",
    )


def _indexed(repository: str, by_path: Mapping[str, RemoteFile], index: bytes) -> set[str]:
    shown = f"{repository}: {INDEX_NAME}"
    names = parse_object(index, shown, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise HubError(f"{shown}: weight_map", expected="names of tensors and files")
    shards = set()
    for name in names.values():
        if not isinstance(name, str) or name not in by_path or not name.endswith(".safetensors"):
            raise HubError(
                f"{shown} speaks of {str(name)[:80]!r}",
                expected="a safetensors file of the repository",
                fix="The repository is damaged or still being uploaded.",
            )
        shards.add(name)
    return shards


def _one_gguf(repository: str, by_path: Mapping[str, RemoteFile], gguf: list[str]) -> set[str]:
    """A repository often has the same model in a dozen sizes."""
    groups: dict[str, list[str]] = {}
    for path in gguf:  # Parts of one are numbered model-00001-of-00005.gguf.
        stem, separator, rest = path.rpartition("-of-")
        groups.setdefault(stem.rpartition("-")[0] if separator and rest else path, []).append(path)
    if len(groups) > 1:
        sizes = ", ".join(
            f"{path} ({sum(by_path[part].size for part in parts) / 2**30:.1f} GiB)"
            for path, parts in groups.items()
        )
        raise UsageError(
            f"{repository} has {len(groups)} models: {sizes[:1500]}",
            fix="Choose one with --include, for instance --include '*Q4_K_M*'.",
        )
    return set(gguf)


def _included(by_path: Mapping[str, RemoteFile], patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {path for path in by_path if _fits(path, pattern)}
        plain = {path for path in fitting if PurePosixPath(path).suffix in PLAIN_SUFFIXES}
        if not plain:
            raise UsageError(
                f"--include {pattern}",
                expected="a pattern of safetensors, GGUF or text files",
                found=f"{len(fitting)} files of other kinds" if fitting else "no file fits it",
                fix="Pickles and programs are never fetched.",
            )
        chosen |= plain
    return chosen


def _fits(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(PurePosixPath(path).name, pattern)


def _is_weight(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))
