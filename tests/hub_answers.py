"""What the Hub answers to a well-formed request: the headers and error texts its client reads.

Facts, as seen on huggingface.co in 2026: a file in LFS is a 302 to a CDN, whose ETag is not the
file's sha256 (X-Linked-Etag of the redirect is); any other file is a relative 307 to a cache on the
Hub itself; a repository that does not exist is 401 to who sends no token and 404 to who does; the
listing of a gated repository is public, its files are not.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from hub_messages import Answer, Content, Kind, Request, parse_range
from hub_repositories import Blob, Commit, Repository, StoredFile, Token

NAME = "(?P<repository>[^/]+/[^/]+)"
PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("whoami", re.compile("/api/whoami-v2")),
    ("bytes", re.compile(f"/api/resolve-cache/models/{NAME}/(?P<revision>[^/]+)/(?P<path>.+)")),
    ("tree", re.compile(f"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")),
    ("refs", re.compile(f"/api/models/{NAME}/refs")),
    ("auth-check", re.compile(f"/api/models/{NAME}/auth-check")),
    ("xet-token", re.compile(f"/api/models/{NAME}/xet-read-token/(?P<revision>[^/]+)")),
    ("info", re.compile(f"/api/models/{NAME}(?:/revision/(?P<revision>[^/]+))?")),
    ("resolve", re.compile(f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")),
)
ON_CDN = re.compile(f"/{NAME}/(?P<revision>[^/]+)/[0-9a-f]+")

RATE_LIMIT = {
    "RateLimit": '"api";r=499;t=295',
    "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
}
"""Sent with every answer of the Hub's API, 429 or not."""


def read_target(request: Request, *, direct: bool) -> None:
    """Fills in what the request's target names."""
    parts = urlsplit(request.target)
    request.query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for kind, pattern in (("bytes", ON_CDN),) if request.on_cdn else PATTERNS:
        if match := pattern.fullmatch(parts.path):
            names = {name: unquote(value or "") for name, value in match.groupdict().items()}
            request.kind = "bytes" if direct and kind == "resolve" else kind
            request.repository = names.get("repository", "")
            request.revision = names.get("revision") or "main"
            request.path = names.get("path") or request.query.get("path", "")
            return


def json_answer(document: object, headers: Mapping[str, str] | None = None) -> Answer:
    content = Content(Blob(json.dumps(document).encode()))
    return Answer(
        200,
        {"Content-Type": "application/json; charset=utf-8", **RATE_LIMIT, **(headers or {})},
        content,
    )


def error_answer(status: int, message: str, code: str | None = None) -> Answer:
    """As the Hub sends it: the code and the text in headers, the text again in the body."""
    answer = json_answer({"error": message})
    answer.status = status
    if code is not None:
        answer.headers["X-Error-Code"] = code
    answer.headers["X-Error-Message"] = message
    return answer


@dataclass
class Hub:
    """The state that answers come from; nothing in it knows of sockets.

    moved: old names of repositories. direct: files come from where they are asked for, as a mirror
    without a CDN sends them. xet: headers that offer Xet. page_size: entries of a tree listing at
    once. link_age: CDN links signed at an earlier age have expired."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    direct: bool = False
    xet: bool = False
    page_size: int = 1000
    endpoint: str = ""
    cdn_endpoint: str = ""
    link_age: int = 0

    def answer(self, request: Request) -> Answer:
        if request.on_cdn:
            return self._from_cdn(request)
        credentials = request.headers.get("authorization")
        token = self.tokens.get(credentials.removeprefix("Bearer ")) if credentials else None
        if credentials and token is None:
            return error_answer(401, "Invalid credentials in Authorization header")
        if request.kind == "whoami":
            return _whoami(token)
        if request.kind == "unknown":
            return error_answer(404, "Sorry, we can't find the page you are looking for.")
        if request.repository in self.moved:
            old, new = f"/{request.repository}", f"/{self.moved[request.repository]}"
            return Answer(307, {"Location": request.target.replace(old, new, 1)})
        repository = self.repositories.get(request.repository)
        if repository is None or (
            repository.private and (token is None or repository.name not in token.private)
        ):
            if (
                token is None
            ):  # Whether it exists is told to nobody without a token; no X-Error-Code.
                return error_answer(401, "Invalid username or password.")
            return error_answer(404, "Repository not found", "RepoNotFound")
        if request.kind in ("resolve", "bytes", "auth-check", "xet-token") and (
            refusal := _refusal(repository, token, self.endpoint)
        ):
            return refusal
        if request.kind == "refs":
            return _refs(repository)
        if request.kind == "auth-check":
            return json_answer({})
        commit = repository.resolve(request.revision)
        if commit is None:
            message = f"Invalid rev id: {request.revision}"
            return error_answer(404, message, "RevisionNotFound")
        if request.kind == "info":
            return json_answer(_info(repository, commit, with_blobs="blobs" in request.query))
        if request.kind == "tree":
            return self._tree(request, commit)
        if request.kind == "xet-token":
            return self._xet_token()
        file = commit.files.get(request.path)
        if file is None:
            answer = error_answer(404, "Entry not found", "EntryNotFound")
            answer.headers["X-Repo-Commit"] = commit.id
            return answer
        if request.kind == "bytes":
            etag = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.id}
            return file_answer(request, file, etag)
        return self._redirect(request, commit, file)

    def _redirect(self, request: Request, commit: Commit, file: StoredFile) -> Answer:
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if not file.in_lfs:
            query = urlencode({urlsplit(request.target).path: "", "etag": f'"{file.etag}"'})
            place = f"/api/resolve-cache/models/{request.repository}/{commit.id}/{quote(file.path)}"
            return Answer(307, {**headers, "Location": f"{place}?{query}"})
        headers |= {
            "X-Linked-Size": str(file.blob.size),
            "X-Linked-Etag": f'"{file.etag}"',
            "ETag": f'"{file.blob.lfs_pointer.git_sha1}"',
        }
        if self.xet:
            route = f"{self.endpoint}/api/models/{request.repository}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": file.blob.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        query = urlencode({"path": file.path, "Expires": "4070908800", "Signature": self.link_age})
        place = f"/{request.repository}/{commit.id}/{file.etag}"
        return Answer(302, {**headers, "Location": f"{self.cdn_endpoint}{place}?{query}"})

    def _from_cdn(self, request: Request) -> Answer:
        """No token is looked at: the link itself is the permission."""
        repository = self.repositories.get(request.repository)
        commit = repository.resolve(request.revision) if repository else None
        file = commit.files.get(request.path) if commit else None
        if file is None or request.query.get("Signature") != str(self.link_age):
            text = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
            return Answer(403, {"Content-Type": "application/xml"}, Content(Blob(text)))
        return file_answer(request, file, {"ETag": f'"{file.blob.xet_hash}"'})

    def _tree(self, request: Request, commit: Commit) -> Answer:
        recursive = request.query.get("recursive", "").lower() == "true"
        entries = list(_entries(commit, request.path, recursive, self.xet))
        if request.path and not entries:
            return error_answer(404, f"{request.path} does not exist", "EntryNotFound")
        start = int(request.query.get("cursor", "0"))
        stop = start + self.page_size
        headers = {}
        if stop < len(entries):
            query = urlencode({**request.query, "cursor": stop})
            headers["Link"] = (
                f'<{self.endpoint}{urlsplit(request.target).path}?{query}>; rel="next"'
            )
        return json_answer(entries[start:stop], headers)

    def _xet_token(self) -> Answer:
        headers = {
            "X-Xet-Cas-Url": self.cdn_endpoint,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": "4070908800",
        }
        return json_answer({}, headers)


def file_answer(request: Request, file: StoredFile, headers: Mapping[str, str]) -> Answer:
    """The bytes of a file, or the range of them that is asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    size = file.blob.size
    wanted = request.headers.get("range")
    if request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        wanted = None  # The file is another one than the client has a part of: all of it.
    try:
        request.range = parse_range(wanted, size)
    except ValueError:
        return Answer(416, {"Content-Range": f"bytes */{size}"})
    if request.range is None:
        return Answer(200, headers, Content(file.blob))
    first, last = request.range
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(206, headers, Content(file.blob, first, last - first + 1))


def _refusal(repository: Repository, token: Token | None, endpoint: str) -> Answer | None:
    """The three ways of having no access to a gated repository's files."""
    if repository.disabled:
        return error_answer(403, "Access to this resource is disabled.")
    if not repository.gated:
        return None
    restricted = f"Access to model {repository.name} is restricted"
    if token is None:
        text = f"{restricted}. You must have access to it and be authenticated to access it."
        return error_answer(401, f"{text} Please log in.", "GatedRepo")
    if not token.reads_gated:  # No code: the client knows it by its text alone.
        text = (
            "Please enable access to public gated repositories in your fine-grained token settings"
        )
        return error_answer(403, f"{text} to view this repository.")
    if repository.name not in token.accepted:
        text = f"{restricted} and you are not in the authorized list."
        visit = f"Visit {endpoint}/{repository.name} to ask for access."
        return error_answer(403, f"{text} {visit}", "GatedRepo")
    return None


def _whoami(token: Token | None) -> Answer:
    if token is None:
        return error_answer(401, "Invalid username or password.")
    access: dict[str, object] = {"displayName": "test", "role": "read"}
    if not token.reads_gated:
        scopes = {"canReadGatedRepos": False, "global": [], "scoped": []}
        access |= {"role": "fineGrained", "fineGrained": scopes}
    user = {"type": "user", "id": "1", "name": token.user, "fullname": token.user, "orgs": []}
    return json_answer({**user, "auth": {"type": "access_token", "accessToken": access}})


def _refs(repository: Repository) -> Answer:
    def listed(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": commit}
            for name, commit in names.items()
        ]

    branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
    return json_answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def _info(repository: Repository, commit: Commit, *, with_blobs: bool) -> dict[str, object]:
    siblings: list[dict[str, object]] = []
    for file in commit.files.values():
        sibling: dict[str, object] = {"rfilename": file.path}
        if with_blobs:
            sibling |= {"blobId": _git_id(file), "size": file.blob.size}
            if file.in_lfs:
                pointer = file.blob.lfs_pointer.size
                sibling["lfs"] = {
                    "sha256": file.blob.sha256,
                    "size": file.blob.size,
                    "pointerSize": pointer,
                }
        siblings.append(sibling)
    return {
        "_id": "0" * 24,
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.name.split("/")[0],
        "sha": commit.id,
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "private": repository.private,
        "gated": repository.gated,
        "disabled": repository.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
        **repository.details,
    }


def _entries(
    commit: Commit, folder: str, recursive: bool, xet: bool
) -> Iterator[dict[str, object]]:
    """Files and directories below a folder, directories before what is in them."""
    prefix = f"{folder}/" if folder else ""
    seen: set[str] = set()
    for path, file in commit.files.items():
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
            directory = prefix + "/".join(inner[:depth])
            if directory not in seen:
                seen.add(directory)
                tree_id = Blob(f"{commit.id}{directory}".encode()).git_sha1
                yield {"type": "directory", "oid": tree_id, "size": 0, "path": directory}
        if recursive or len(inner) == 1:
            entry = {"type": "file", "oid": _git_id(file), "size": file.blob.size, "path": path}
            if file.in_lfs:
                pointer = file.blob.lfs_pointer.size
                lfs = {"oid": file.blob.sha256, "size": file.blob.size, "pointerSize": pointer}
                entry["lfs"] = lfs
                if xet:
                    entry["xetHash"] = file.blob.xet_hash
            yield entry


def _git_id(file: StoredFile) -> str:
    return (file.blob.lfs_pointer if file.in_lfs else file.blob).git_sha1
