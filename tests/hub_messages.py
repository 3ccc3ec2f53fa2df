"""One request to a Hub stand-in, the answer it gets, and how that answer goes down the wire."""

import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

from hub_repositories import Blob

Kind = Literal[
    "info", "tree", "refs", "auth-check", "whoami", "xet-token", "resolve", "bytes", "unknown"
]
"""What is asked for. `resolve` is the Hub's redirect to a file, `bytes` the file it leads to."""

STEP = 1 << 20
"""Bytes handed to the kernel at once: what a count of sent bytes may be wrong by after a cut."""
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Request:
    """What was asked for and what was sent: written down for every request.

    repository and path are names inside the Hub, whichever host and redirect the request is for.
    range: the first and the last byte that a Range header asks for, in the file; None without."""

    method: str
    target: str
    on_cdn: bool
    headers: dict[str, str]
    kind: Kind = "unknown"
    repository: str = ""
    revision: str = ""
    path: str = ""
    query: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    finished: float | None = None
    status: int = 0
    range: tuple[int, int] | None = None
    bytes_sent: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def authorized(self) -> bool:
        """Whether a token came with it (which none may to a CDN)."""
        return "authorization" in self.headers


Proceed = Callable[[Request], "Answer"]
"""What answers a request, or would without the fault that is handed it."""


@dataclass
class Content:
    """A part of a blob: the body of an answer."""

    blob: Blob
    start: int = 0
    length: int = -1

    def __post_init__(self) -> None:
        if self.length < 0:
            self.length = self.blob.size - self.start


@dataclass
class Answer:
    """A response and how it is delivered.

    cut_at, stall_at: in bytes of the body. flips: bytes of the blob whose lowest bit is wrong.
    reset: a cut is a TCP reset in place of an orderly close. silent: not even a status line."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: Content = field(default_factory=lambda: Content(Blob(b"")))
    cut_at: int | None = None
    reset: bool = False
    stall_at: int | None = None
    stall_seconds: float | None = None
    bytes_per_second: float | None = None
    flips: frozenset[int] = frozenset()
    silent: bool = False


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte; None to send all. Several ranges at once are not served: all is sent.

    Raises ValueError where nothing of the range lies in the file (416)."""
    match = RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size - 1
    else:
        start, stop = int(first), min(int(last), size - 1) if last else size - 1
    if start > stop:
        raise ValueError(f"bytes {start} to {stop} of {size}")
    return start, stop


def covers(header: str | None, byte: int) -> bool:
    """Whether a Range header (none: everything) asks for a byte. A range from the end may."""
    match = RANGE.fullmatch(header.strip()) if header else None
    if match is None:
        return True
    first, last = match.groups()
    return not first or (int(first) <= byte and (not last or byte <= int(last)))


def deliver(
    connection: socket.socket,
    answer: Answer,
    sending: Callable[[int], None],
    stopping: threading.Event,
) -> None:
    """The body. `sending` is told each count before it is sent (and the negative of what was not),
    so that no client has bytes that are not counted. `stopping` ends stalls and slow bodies."""
    content = answer.content
    marks = sorted(
        {mark for flip in answer.flips for mark in (flip - content.start, flip - content.start + 1)}
        | {mark for mark in (answer.stall_at, answer.cut_at) if mark is not None}
    )
    end = content.length if answer.cut_at is None else min(content.length, answer.cut_at)
    file = None if isinstance(content.blob.source, bytes) else content.blob.source.open("rb")
    try:
        position = 0
        stalled = False
        while True:
            if position == answer.stall_at and not stalled:
                stalled = True
                stopping.wait(answer.stall_seconds)
            if position >= end or stopping.is_set():
                return
            step = min(STEP, end - position)
            if answer.bytes_per_second is not None:
                step = min(step, max(1, int(answer.bytes_per_second / 20)))
            step = min([step, *(mark - position for mark in marks if mark > position)])
            place = content.start + position
            sending(step)
            sent = 0
            try:
                if place in answer.flips:
                    wrong = content.blob.read(place, 1)[0] ^ 1
                    sent = connection.send(bytes([wrong]))
                else:
                    sent = _send(connection, content.blob, file, place, step)
            finally:
                sending(sent - step)
            if not sent:
                raise OSError(f"{content.blob.source!r:.100} became shorter while it was sent")
            position += sent
            if answer.bytes_per_second is not None:
                stopping.wait(sent / answer.bytes_per_second)
    finally:
        if file is not None:
            file.close()


def _send(
    connection: socket.socket, blob: Blob, file: BinaryIO | None, start: int, length: int
) -> int:
    """The bytes that were taken; from a file without a copy where the system can."""
    if isinstance(blob.source, bytes):
        return connection.send(memoryview(blob.source)[start : start + length])
    assert file is not None
    if hasattr(os, "sendfile"):
        return os.sendfile(connection.fileno(), file.fileno(), start, length)
    file.seek(start)
    block = file.read(length)
    connection.sendall(block)
    return len(block)


def ask(
    url: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of one request, without following anything."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()
