"""What the Hub says of a model's repository: its commit, its files, who may read them.

Everything here goes through huggingface_hub: tokens (HF_TOKEN, `hf auth login`), HF_ENDPOINT,
proxies and certificates are its business. What the server says is checked before anything is named
after it.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.paths import check_name, quoted
from localr1.errors import (
    AccessError,
    FormatError,
    HubError,
    NotFoundError,
    UnreachableError,
)
from localr1.hub.known import find_model
from localr1.hub.reference import COMMIT, Reference

MAX_FILES: Final = 20_000
MAX_FILE_BYTES: Final = 1 << 42
TIMEOUT_SECONDS: Final = 20.0
DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_SHA1: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """path: in the repository, checked to be a safe relative name. size: bytes. etag: the sha256 of
    a file of the large-file storage, git's sha1 of a blob for any other; the cache's name for its
    bytes. xet_hash: where the Hub stores it in chunks, its name there."""

    path: str
    size: int
    etag: str
    xet_hash: str | None = None

    def new_digest(self) -> Any:
        """A hash of hashlib's that ends in `etag` after all the file's bytes."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        # As git names a file's bytes.
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_whole(self, content: bytes) -> bool:
        """Whether these are the file's bytes."""
        digest = self.new_digest()
        digest.update(content)
        return bool(digest.hexdigest() == self.etag)


@dataclass(frozen=True)
class Listing:
    """One commit of a repository. licence: as its model card says, else as localr1 knows it."""

    reference: Reference
    commit: str
    files: tuple[RemoteFile, ...]
    licence: str | None

    @property
    def repository(self) -> str:
        return self.reference.repository


@dataclass(frozen=True)
class Location:
    """Where a file's bytes are to be had now, and what to send with the request."""

    url: str
    headers: Mapping[str, str]


class Hub:
    """The server that HF_ENDPOINT names, huggingface.co by default, as the user's token sees it."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        """endpoint, token: in place of those of the environment."""
        import httpx2
        from huggingface_hub import HfApi, constants, get_session, get_token

        self.endpoint = (endpoint or constants.ENDPOINT or DEFAULT_ENDPOINT).rstrip("/")
        self.has_custom_endpoint = self.endpoint != DEFAULT_ENDPOINT
        self.is_offline = constants.is_offline_mode()
        self._token = token or get_token()
        self._api = HfApi(endpoint=self.endpoint, token=self._token or False)
        # Without this a server that never answers is waited for without end.
        get_session().timeout = httpx2.Timeout(TIMEOUT_SECONDS)

    def listing(self, reference: Reference) -> Listing:
        """Raises NotFoundError, AccessError, and HubError for a line or server that fails, or a
        listing that cannot be trusted."""
        with self._errors(reference):
            info = self._api.model_info(
                reference.repository, revision=reference.revision, timeout=TIMEOUT_SECONDS
            )
            commit = info.sha
            if commit is None or not COMMIT.fullmatch(commit):
                raise HubError(
                    f"{reference.repository}: commit",
                    expected="40 hex digits",
                    found=quoted(commit),
                )
            entries = self._api.list_repo_tree(
                reference.repository, revision=commit, recursive=True
            )
            files = tuple(_checked_files(entries, reference.repository))
        card = info.card_data
        licence = card.get("license_name") or card.get("license") if card is not None else None
        if not isinstance(licence, str):
            known = find_model(reference.repository)
            licence = None if known is None else known.licence
        return Listing(reference, commit, files, licence)

    def locate(self, listing: Listing, file: RemoteFile) -> Location:
        """Asks where the bytes are: usually elsewhere, under an address that is good for an hour.

        Raises as `listing`; a token is not sent to another host than the Hub's.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers

        from localr1.hub.ranges import check_redirect, origin_of

        url = hf_hub_url(
            listing.repository, file.path, revision=listing.commit, endpoint=self.endpoint
        )
        with self._errors(listing.reference):
            found = get_hf_file_metadata(
                url, token=self._token or False, timeout=TIMEOUT_SECONDS, endpoint=self.endpoint
            )
        if found.commit_hash is None:  # A page of a hotel's network, say.
            raise UnreachableError(
                f"{url}: an answer that is not the Hub's",
                fix="Check the network, HF_ENDPOINT and the proxy settings, and try again.",
            )
        if found.size is not None and found.size != file.size:
            raise HubError(
                f"{file.path}: bytes", expected=f"{file.size}, as listed", found=found.size
            )
        check_redirect(url, found.location)
        headers = dict(build_hf_headers(token=self._token or False))
        if origin_of(found.location) != origin_of(url):
            headers.pop("authorization", None)
        return Location(found.location, headers)

    def fetch_whole(self, listing: Listing, file: RemoteFile, hub_cache: Path) -> None:
        """By huggingface_hub's own means, which are hf-xet's for a file on Xet storage (that knows
        no custom endpoint): not resumed, checked by the caller. Raises as `listing`."""
        from huggingface_hub import hf_hub_download

        with self._errors(listing.reference):
            hf_hub_download(
                listing.repository,
                file.path,
                revision=listing.commit,
                cache_dir=hub_cache,
                endpoint=self.endpoint,
                token=self._token or False,
            )

    @contextmanager
    def _errors(self, reference: Reference) -> Iterator[None]:
        """huggingface_hub's errors as ours: what was asked for, why not, what to do."""
        import httpx2
        from huggingface_hub import errors

        shown = f"{reference.repository}@{reference.revision}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise self._gated(reference, error) from error
        except errors.RevisionNotFoundError as error:
            raise NotFoundError(
                f"{shown}: the repository is there, but has no such branch, tag or commit",
                fix=f"See {self.endpoint}/{reference.repository}/commits/main for what it has.",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise self._not_found(reference) from error
        except errors.OfflineModeIsEnabled as error:
            raise HubError(
                f"{shown}: HF_HUB_OFFLINE is set, and not all of it is in the cache",
                fix="Unset it to download.",
            ) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(reference, error) from error
        except (httpx2.HTTPError, OSError, ValueError, TypeError, KeyError) as error:
            # Of what the server may send, huggingface_hub checks little: JSON of another form ends
            # in one of the last three.
            raise UnreachableError(
                f"{self.endpoint} gave no usable answer about {shown}",
                found=quoted(str(error) or type(error).__name__, 200),
                fix="Check the network, HF_ENDPOINT and the proxy settings, and try again.",
            ) from error

    def _gated(self, reference: Reference, error: Any) -> AccessError:
        page = f"{self.endpoint}/{reference.repository}"
        if self._token is None:
            return AccessError(
                f"{reference.repository}: its licence must be accepted before it is given out, and "
                "you are not logged in",
                fix=f"Accept it at {page}, make a token at {self.endpoint}/settings/tokens, and "
                "log in: hf auth login, or set HF_TOKEN.",
            )
        return AccessError(
            f"{reference.repository}: your account has not been let in",
            fix=f"Accept the licence at {page}; some are granted by hand, which takes a while.",
        )

    def _not_found(self, reference: Reference) -> NotFoundError:
        return NotFoundError(
            f"{reference.repository}: {self.endpoint} knows no such model, or does not show it",
            fix="Check the spelling; for a private model log in first: hf auth login, or set "
            "HF_TOKEN.",
        )

    def _refused(self, reference: Reference, error: Any) -> HubError | NotFoundError:
        shown = f"{reference.repository}@{reference.revision}"
        status = error.response.status_code if error.response is not None else None
        if status == 401 and self._token is None:  # Who is not known is not told what there is.
            return self._not_found(reference)
        if status == 401:
            return AccessError(
                f"{shown}: the Hub does not accept your token",
                fix="Log in again: hf auth login, or correct HF_TOKEN.",
            )
        if status == 403 and "fine-grained" in str(error).lower():
            return AccessError(
                f"{shown}: your token may not read it, as it is gated or private",
                fix=f"Allow it to, in its settings at {self.endpoint}/settings/tokens.",
            )
        if status == 403:
            return AccessError(f"{shown}: access refused", found=quoted(str(error).strip(), 200))
        if status == 429:
            return UnreachableError(
                f"{shown}: the Hub has had too many requests from here",
                fix="Wait some minutes and give the same command again; more are allowed to who is "
                "logged in.",
            )
        if status is not None and 400 <= status < 500:
            return HubError(f"{shown}: the Hub answered {status}", found=quoted(str(error), 200))
        return UnreachableError(
            f"{shown}: the Hub answered {status}",
            fix="It may be down: try again in a while; what has been fetched is kept.",
        )


def _checked_files(entries: Any, repository: str) -> Iterator[RemoteFile]:
    """A file whose name cannot be stored everywhere is left out: nothing that is needed has one."""
    from huggingface_hub.hf_api import RepoFile

    for count, entry in enumerate(entries):
        if count >= MAX_FILES:
            raise HubError(f"{repository}: files", expected=f"at most {MAX_FILES:,}", found="more")
        if isinstance(entry, RepoFile) and _is_storable(entry.path):
            yield _checked_file(entry, repository)


def _is_storable(path: object) -> bool:
    try:
        check_name(path if isinstance(path, str) else "")
    except FormatError:
        return False
    return True


def _checked_file(entry: Any, repository: str) -> RemoteFile:
    is_large = entry.lfs is not None
    size = entry.lfs.size if is_large else entry.size
    etag = entry.lfs.sha256 if is_large else entry.blob_id
    shown = f"{repository}: {entry.path}"
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise HubError(f"{shown}: size", expected="a number of bytes", found=quoted(size))
    pattern = _SHA256 if is_large else _SHA1
    if not isinstance(etag, str) or not pattern.fullmatch(etag):
        raise HubError(
            f"{shown}: hash", expected="one that the bytes can be checked by", found=quoted(etag)
        )
    xet = entry.xet_hash
    return RemoteFile(entry.path, size, etag, xet if isinstance(xet, str) else None)
