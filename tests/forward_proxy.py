"""A proxy on loopback for plain HTTP that asks for a password, and remembers what went through."""

import base64
import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

USER, PASSWORD = "guest", "p@ss word"
EXPECTED = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class ForwardProxy:
    """url: with user and password, as environments give it. passed: addresses that were asked for;
    refused: those without the password."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.refused: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://{USER}:p%40ss%20word@127.0.0.1:{port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers.get("Proxy-Authorization") != EXPECTED:
                    proxy.refused.append(self.path)
                    self.send_error(407)
                    return
                proxy.passed.append(self.path)
                target = urlsplit(self.path)
                connection = http.client.HTTPConnection(target.netloc, timeout=30)
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if not name.lower().startswith("proxy-")
                }
                path = target.path + (f"?{target.query}" if target.query else "")
                connection.request(self.command, path, headers=headers)
                answer = connection.getresponse()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                while piece := answer.read(1 << 20):
                    self.wfile.write(piece)
                connection.close()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler
