"""What a Hub stand-in can be told to do wrong: `hub.add(cut(at=1000), "*.safetensors", count=1)`.

A fault wraps whatever answers a request, so faults combine: each may change the request before it
is answered, replace the answer, or change it. Which requests it meets is the rule's to say.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from hub_answers import error_answer
from hub_messages import Answer, Content, Kind, Proceed, Request, covers
from hub_repositories import Blob

Entries = list[dict[str, Any]]

HOSTILE_PATHS = (
    "../climbs.json", "a/../../climbs.json", "/etc/absolute.json", "//host/share.json",
    "back\\slash.json", "..\\climbs.json", "nul\0byte.json", "C:drive.json", "C:\\drive.json",
    "a//double.json", "./dot.json", "a/./dot.json", "trailing/", "", ".", "..", "con.json", "aux",
    "line\nbreak.json", "escape\x1b[2J.json", "ends-in-dot.", "ends-in-space ", "stream.json:x",
    "long" * 100 + ".json", "deep/" * 200 + "x.json", "\ud83d.json", "question?.json", "star*.json",
)  # fmt: skip
"""Names that no file below a directory may have, on one system or another: for listings."""
LYING_SIZES: tuple[Any, ...] = (-1, 1 << 62, 1 << 70, 1.5, "12", None, True, [], float("nan"))
ODD_ETAGS: tuple[str | None, ...] = (
    None, "", '""', "unquoted", 'W/"weak"', '"../../climbs"', '"/etc/absolute"', '"a/b"', '"a\\b"',
    '"not-a-hash"', '"' + "g" * 64 + '"', '"' + "0" * 64 + '"', '"' + "a" * 63 + '"', '"C:x"',
    '"' + "a" * 400 + '"', '"nul\x01"',
)  # fmt: skip
"""Values of an ETag header; None: there is none."""


@dataclass(frozen=True)
class Fault:
    """act: answers a request, by itself or by what `proceed` answers. kinds and methods: of the
    requests it is about unless a rule says otherwise. covering: only of those for this byte."""

    name: str
    act: Callable[[Request, Proceed], Answer]
    kinds: tuple[Kind, ...] = ("bytes",)
    methods: tuple[str, ...] = ("GET",)
    covering: int | None = None


@dataclass
class Rule:
    """A fault and the requests that meet it. path: a pattern as of fnmatch. skip: so many matching
    requests pass first. count: so many meet it then; None: all. met: how many did."""

    fault: Fault
    path: str
    kinds: tuple[Kind, ...]
    methods: tuple[str, ...]
    skip: int
    count: int | None
    met: int = 0

    def around(self, proceed: Proceed) -> Proceed:
        return lambda request: self.fault.act(request, proceed)

    def meets(self, request: Request) -> bool:
        """Counts, too: to be asked once about a request, by one thread at a time."""
        if request.kind not in self.kinds or request.method not in self.methods:
            return False
        if not fnmatchcase(request.path, self.path):
            return False
        byte = self.fault.covering
        if byte is not None and not covers(request.headers.get("range"), byte):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.count is not None and self.met >= self.count:
            return False
        self.met += 1
        return True


def cut(at: int, *, reset: bool = False) -> Fault:
    """The connection ends after this many bytes of the body, orderly or with a reset."""

    def act(request: Request, proceed: Proceed) -> Answer:
        return replace(proceed(request), cut_at=at, reset=reset)

    return Fault(f"cut at {at}", act)


def stall(at: int, seconds: float | None = None) -> Fault:
    """Nothing is sent for a while (None: for ever) after this many bytes of the body."""

    def act(request: Request, proceed: Proceed) -> Answer:
        return replace(proceed(request), stall_at=at, stall_seconds=seconds)

    return Fault(f"stall at {at}", act)


def slow(bytes_per_second: float) -> Fault:
    def act(request: Request, proceed: Proceed) -> Answer:
        return replace(proceed(request), bytes_per_second=bytes_per_second)

    return Fault(f"{bytes_per_second} bytes/s", act)


def flip(at: int) -> Fault:
    """The lowest bit of one byte of the file is wrong; nothing else shows it. Met only by requests
    that cover the byte, so that count=1 means one wrong download of it."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        return replace(answer, flips=answer.flips | {at})

    return Fault(f"flip at {at}", act, covering=at)


def ignore_range() -> Fault:
    """200 and the whole file, whatever range was asked for."""

    def act(request: Request, proceed: Proceed) -> Answer:
        headers = {name: value for name, value in request.headers.items() if name != "range"}
        wanted = request.headers
        request.headers = headers
        try:
            return proceed(request)
        finally:
            request.headers = wanted

    return Fault("range ignored", act)


def content_range(*, shift: int = 0, total: int | None = None, text: str | None = None) -> Fault:
    """A Content-Range that names bytes further on than are sent, another total, or any text."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        if request.range is not None:
            first, last = request.range
            size = answer.content.blob.size if total is None else total
            stated = f"bytes {first + shift}-{last + shift}/{size}"
            answer.headers["Content-Range"] = stated if text is None else text
        return answer

    return Fault("wrong Content-Range", act)


def header(name: str, value: str | None, *kinds: Kind) -> Fault:
    """One header of the answer set, or (None) left out. kinds: resolve and bytes if not given."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        _set_header(answer, name, value)
        return answer

    return Fault(f"{name}: {value}", act, kinds or ("resolve", "bytes"), ("GET", "HEAD"))


def etag(value: str | None) -> Fault:
    """Both headers that name a file's bytes: X-Linked-Etag and ETag."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        _set_header(answer, "ETag", value)
        if "X-Linked-Etag" in answer.headers:
            _set_header(answer, "X-Linked-Etag", value)
        return answer

    return Fault(f"etag {value}", act, ("resolve", "bytes"), ("GET", "HEAD"))


def html(status: int = 200) -> Fault:
    """A page, as a proxy or a hotel's network sends it in place of anything."""
    page = Blob(b"<!DOCTYPE html><html><body>Please sign in.</body></html>")

    def act(request: Request, proceed: Proceed) -> Answer:
        return Answer(status, {"Content-Type": "text/html; charset=utf-8"}, Content(page))

    return Fault("page", act, ("info", "tree", "resolve", "bytes"), ("GET", "HEAD"))


def status(
    code: int,
    message: str = "Refused by the test",
    *,
    error_code: str | None = None,
    retry_after: str | None = None,
    rate_limit_reset: int | None = None,
) -> Fault:
    """Another status. retry_after: seconds or a date. rate_limit_reset: seconds, told in the header
    RateLimit, as the Hub does with a 429."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = error_answer(code, message, error_code)
        _set_header(answer, "Retry-After", retry_after)
        if rate_limit_reset is not None:
            _set_header(answer, "RateLimit", f'"api";r=0;t={rate_limit_reset}')
        return answer

    return Fault(f"status {code}", act, ("info", "tree", "resolve", "bytes"), ("GET", "HEAD"))


def redirect(location: str | None = None, code: int = 302) -> Fault:
    """To any place: another host, another scheme; None: to where the request went, for ever."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)  # Its headers still name the commit, the size and the hash.
        answer = Answer(code, answer.headers)
        _set_header(answer, "Location", request.target if location is None else location)
        return answer

    return Fault(f"redirect to {location}", act, ("resolve",), ("GET", "HEAD"))


def no_response() -> Fault:
    """The connection closes before a status line."""

    def act(request: Request, proceed: Proceed) -> Answer:
        return replace(proceed(request), silent=True)

    return Fault("silent", act, ("info", "tree", "resolve", "bytes"), ("GET", "HEAD"))


def compressed() -> Fault:
    """To a client that accepts gzip: the whole file, compressed, in chunks, of no stated length."""

    def act(request: Request, proceed: Proceed) -> Answer:
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return proceed(request)
        answer = ignore_range().act(request, proceed)
        blob = answer.content.blob
        packed = gzip.compress(blob.read(0, blob.size))
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
        changed = {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
        weak = {"ETag": f"W/{answer.headers['ETag']}"} if "ETag" in answer.headers else {}
        return Answer(200, {**answer.headers, **changed, **weak}, Content(Blob(body)))

    return Fault("gzip", act)


def truncated_json(at: int) -> Fault:
    """A document that ends in its middle, in a response that is whole."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        text = answer.content.blob.read(0, at)
        return replace(answer, content=Content(Blob(text)))

    return Fault(f"JSON of {at} bytes", act, ("info", "tree"))


def before(action: Callable[[], object], *kinds: Kind) -> Fault:
    """Something happens just before the request is answered: a branch moves, links expire.
    kinds: resolve if not given."""

    def act(request: Request, proceed: Proceed) -> Answer:
        action()
        return proceed(request)

    return Fault("before", act, kinds or ("resolve",), ("GET", "HEAD"))


def edited(change: Callable[[Entries], Entries]) -> Fault:
    """The entries of listings, of the tree as of model_info, as they were and as they shall be."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        if answer.status != 200:
            return answer
        blob = answer.content.blob
        document = json.loads(blob.read(0, blob.size))
        if isinstance(document, dict):
            document["siblings"] = change(document["siblings"])
        else:
            document = change(document)
        return replace(answer, content=Content(Blob(json.dumps(document).encode())))

    return Fault("edited listing", act, ("info", "tree"))


def listed_as(path: str, *names: str) -> Fault:
    """A file stands in listings under other names: several times, or (no name) not at all."""

    def change(entries: Entries) -> Entries:
        changed: Entries = []
        for entry in entries:
            key = "path" if "path" in entry else "rfilename"
            changed += [{**entry, key: name} for name in names] if entry[key] == path else [entry]
        return changed

    return edited(change)


def listed_size(path: str, size: object) -> Fault:
    """A file's size in listings is another one, or none at all."""

    def change(entries: Entries) -> Entries:
        for entry in entries:
            if path in (entry.get("path"), entry.get("rfilename")) and "size" in entry:
                entry["size"] = size
                if "lfs" in entry:
                    entry["lfs"]["size"] = size
        return entries

    return edited(change)


def _set_header(answer: Answer, name: str, value: str | None) -> None:
    for other in [other for other in answer.headers if other.lower() == name.lower()]:
        del answer.headers[other]
    if value is not None:
        answer.headers[name] = value
