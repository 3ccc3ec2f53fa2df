"""How a model of the Hub is named on the command line. Never imports huggingface_hub."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from localr1.errors import NotFoundError, UsageError
from localr1.hub.known import find_model, known_models

DEFAULT_REVISION: Final = "main"
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY: Final = re.compile(rf"{_PART}/{_PART}")
_REVISION: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./+-]{0,199}")
_ADDRESS: Final = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")


@dataclass(frozen=True)
class Reference:
    """repository: "organization/name" on the Hub. revision: branch, tag or commit as it was asked
    for. alias: localr1's own name for the repository, if it has one."""

    repository: str
    revision: str = DEFAULT_REVISION
    alias: str | None = None

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.alias or self.repository


def parse_reference(text: str) -> Reference:
    """An alias, `organization/name`, or the address of a model's page; each may end in `@revision`.

    Raises NotFoundError, with a suggestion, for a single word that is no alias, and UsageError for
    what cannot be a repository or a revision.
    """
    name, separator, revision = _ADDRESS.sub("", text).rstrip("/").partition("@")
    if "/tree/" in name:  # The page of a revision.
        name, _, revision = name.partition("/tree/")
        separator = "@"
    if not separator:
        known = find_model(name)
        revision = DEFAULT_REVISION if known is None else known.revision
    if not _is_safe(_REVISION, revision):
        raise UsageError(
            f"revision {revision[:60]!r}",
            expected="a branch, a tag or a commit",
            fix="Write it behind the name: organization/name@main.",
        )
    if "/" not in name:
        return _known(name, revision)
    if not _is_safe(_REPOSITORY, name) or "--" in name or name.endswith(".git"):
        raise UsageError(
            f"repository {name[:100]!r}",
            expected="organization/name, as on the Hub",
            fix="Copy it from the model's page.",
        )
    known = find_model(name)
    return Reference(name, revision, known.alias if known is not None else None)


def _known(name: str, revision: str) -> Reference:
    known = find_model(name)
    if known is None:
        near = get_close_matches(name, known_models(), n=1)
        raise NotFoundError(
            f"{name[:100]}: no such model is known by name",
            fix=(f"Did you mean {near[0]}? " if near else "")
            + "`localr1 pull` lists the names; any other model is organization/name.",
        )
    if known.repository is None:
        raise UsageError(
            f"{known.alias} comes with localr1", fix=f"Run it: localr1 chat {known.alias}"
        )
    return Reference(known.repository, revision, known.alias)


def _is_safe(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None and ".." not in text
