"""A Hugging Face Hub on loopback that the unmodified huggingface_hub client can talk to, and that
misbehaves where a test asks it to (hub_faults.py).

In a test: `with HubServer(Repository.of("org/name", {...})) as hub:` and `endpoint=hub.endpoint`.
As a process: `python tests/hub_server.py DIRECTORY [--port N]`, where DIRECTORY holds
repositories as ORGANISATION/NAME; it prints its endpoint and runs until it is interrupted.
"""

import argparse
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hub_answers import Hub, read_target
from hub_faults import Fault, Rule, slow
from hub_messages import Answer, Kind, Proceed, Request, deliver
from hub_repositories import Repository, Token


class HubServer:
    """A Hub, its CDN on a port of its own, and a record of every request."""

    def __init__(
        self,
        *repositories: Repository,
        tokens: Mapping[str, Token] | None = None,
        moved: Mapping[str, str] | None = None,
        port: int = 0,
        direct: bool = False,
        xet: bool = False,
        page_size: int = 1000,
    ) -> None:
        """tokens: by their text ("hf_..."). moved: new names of repositories by their old ones. The
        rest is described at `Hub`."""
        self.hub = Hub(
            {repository.name: repository for repository in repositories},
            dict(tokens or {}),
            dict(moved or {}),
            direct=direct,
            xet=xet,
            page_size=page_size,
        )
        self.failures: list[BaseException] = []
        """Errors of the stand-in itself: leaving its `with` block raises the first."""
        self.stopping = threading.Event()
        self._requests: list[Request] = []
        self._rules: list[Rule] = []
        self._changed = threading.Condition()
        self._servers = [_Listener(self, port, on_cdn=False), _Listener(self, 0, on_cdn=True)]
        self.endpoint, self.cdn_endpoint = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )
        self.hub.endpoint, self.hub.cdn_endpoint = self.endpoint, self.cdn_endpoint

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.close_connections()
            server.server_close()
        if self.failures and error is None:
            raise self.failures[0]

    def add(
        self,
        fault: Fault,
        path: str = "*",
        *,
        kind: Kind | None = None,
        method: str | None = None,
        skip: int = 0,
        count: int | None = None,
    ) -> Rule:
        """Requests that match meet the fault from now on. Of several rules the last added is the
        outermost: it sees the request first and the answer last. See `Rule` for the arguments."""
        kinds = fault.kinds if kind is None else (kind,)
        methods = fault.methods if method is None else (method,)
        rule = Rule(fault, path, kinds, methods, skip, count)
        with self._changed:
            self._rules.append(rule)
        return rule

    def remove_rules(self) -> None:
        with self._changed:
            self._rules.clear()

    def answer(self, request: Request) -> Answer:
        read_target(request, direct=self.hub.direct)
        with self._changed:
            self._requests.append(request)
            met = [rule for rule in self._rules if rule.meets(request)]
        proceed: Proceed = self.hub.answer
        for rule in met:
            request.faults.append(rule.fault.name)
            proceed = rule.around(proceed)
        return proceed(request)

    def finished(self, request: Request) -> None:
        with self._changed:
            request.finished = time.monotonic()
            self._changed.notify_all()

    def expire_links(self) -> None:
        """Links to the CDN that were handed out so far answer 403 from now on."""
        self.hub.link_age += 1

    def requests(
        self, kind: Kind | None = None, path: str | None = None, method: str | None = None
    ) -> list[Request]:
        """In the order of their arrival."""
        with self._changed:
            return [
                request
                for request in self._requests
                if kind in (None, request.kind)
                and path in (None, request.path)
                and method in (None, request.method)
            ]

    def forget(self) -> None:
        """Counts anew from here."""
        with self._changed:
            self._requests.clear()

    def fetched_bytes(self, path: str | None = None) -> int:
        """Bytes of a file (of all files) that were sent: at least what clients received. One that
        was killed received less, by what the sockets' buffers held."""
        return sum(request.bytes_sent for request in self.requests("bytes", path, "GET"))

    def fetched_ranges(self, path: str) -> list[tuple[int, int]]:
        """First and last byte of each request for the file's bytes; (0, -1) for all of them."""
        return [request.range or (0, -1) for request in self.requests("bytes", path, "GET")]

    def most_at_once(self) -> int:
        """The largest number of files or parts that were being sent at the same time."""
        events: list[tuple[float, int]] = []
        for request in self.requests("bytes", method="GET"):
            events += [(request.started, 1), (request.finished or time.monotonic(), -1)]
        running = most = 0
        for _, change in sorted(events):
            running += change
            most = max(most, running)
        return most

    def wait_until(self, condition: Callable[["HubServer"], bool], seconds: float = 30) -> None:
        """Until the record says so; looks again whenever a request ends and every 10 ms.

        Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not condition(self):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s; {len(self._requests)} requests so far")
            with self._changed:
                self._changed.wait(0.01)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int, *, on_cdn: bool) -> None:
        self.hub = hub
        self.on_cdn = on_cdn
        self.resets: set[socket.socket] = set()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's question to the name service, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        if request in self.resets:  # No orderly end before the reset.
            self.resets.discard(request)
            request.close()
            return
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Those that clients keep open, and those in the middle of a stall."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # It has gone meanwhile.
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.failures.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, self.server.on_cdn, headers)
        try:
            answer = hub.answer(request)
            self._send(request, answer)
        finally:
            hub.finished(request)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, request: Request, answer: Answer) -> None:
        request.status = answer.status
        if answer.silent:
            self.close_connection = True
            return
        headers = dict(answer.headers)
        length = answer.content.length
        if "Transfer-Encoding" not in headers:
            headers.setdefault("Content-Length", str(length))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return

        def sending(count: int) -> None:
            request.bytes_sent += count

        deliver(self.connection, answer, sending, self.server.hub.stopping)
        promised = headers.get("Content-Length", str(length))
        if answer.cut_at is not None or promised != str(length):
            self.close_connection = True
        if answer.cut_at is not None and answer.reset:
            # Linger on, for no time: close() sends a reset and drops what was not sent yet.
            linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.server.resets.add(self.connection)

    def version_string(self) -> str:
        return "hub-stand-in"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing to stderr: the record has it all."""


def find_repositories(directory: Path) -> list[Repository]:
    """Every ORGANISATION/NAME below a directory.

    Raises SystemExit if there is none."""
    found = [
        Repository.from_directory(f"{path.parent.name}/{path.name}", path)
        for path in sorted(directory.glob("*/*"))
        if path.is_dir()
    ]
    if not found:
        sys.exit(
            f"error: no ORGANISATION/NAME directory in {directory}: make one and put files there"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on loopback, for tests.")
    parser.add_argument("directory", type=Path, help="holds repositories as ORGANISATION/NAME")
    parser.add_argument("--port", type=int, default=0, help="of the Hub; its CDN takes a free one")
    parser.add_argument("--bytes-per-second", type=float, help="of each file that is sent")
    arguments = parser.parse_args()
    repositories = find_repositories(arguments.directory)
    for repository in repositories:
        for file in repository.commits[repository.branches["main"]].files.values():
            _ = file.etag  # Hashed now: the first request for a large file is as quick as the next.
    with HubServer(*repositories, port=arguments.port) as hub:
        if arguments.bytes_per_second:
            hub.add(slow(arguments.bytes_per_second))
        print(hub.endpoint, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
