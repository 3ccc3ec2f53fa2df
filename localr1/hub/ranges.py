"""Reads a range of bytes of a web address into memory that is there already.

The library that huggingface_hub uses for its requests hands out bytes objects of 64 KiB, at half
of what a fast line can carry; here they go from the socket to where they are wanted. What is to be
trusted (certificates) and which proxy to take is decided as that library decides it.
"""

import base64
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from localr1.errors import HubError

MAX_REDIRECTS: Final = 5
MAX_SMALL_BODY: Final = 64 << 10
"""An answer that will not be used is read to its end up to this size, to keep the connection."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_SECRETS: Final = ("authorization", "cookie")


class BadAnswerError(Exception):
    """What was sent is not what was asked for; asking again may help."""


class StatusError(Exception):
    """The server refused. retry_after: seconds it asks to wait, if it does."""

    def __init__(self, status: int, retry_after: float | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(f"the server answered {status}")


@dataclass(frozen=True)
class Origin:
    scheme: str
    host: str
    port: int


@dataclass
class Body:
    """The bytes from `start` on to come; `size` of the whole file. honours_range: False for the
    whole file in place of the part that was asked for."""

    response: http.client.HTTPResponse
    start: int
    size: int
    honours_range: bool

    def read_into(self, buffer: memoryview) -> None:
        """Fills the buffer. Raises BadAnswerError where the body ends early."""
        filled = 0
        while filled < len(buffer):
            count = self.response.readinto(buffer[filled:])
            if not count:
                raise BadAnswerError("the connection was closed early")
            filled += count


@dataclass(frozen=True)
class Route:
    """A connection that leads to an origin. absolute: whether requests on it name the whole
    address, as a proxy wants them. headers: what the proxy wants besides."""

    origin: Origin
    connection: http.client.HTTPConnection
    absolute: bool
    headers: Mapping[str, str]


class RangeReader:
    """One connection, kept for the next request of the same origin. Not for several threads, but
    `abort` may be called from any."""

    def __init__(self, timeout: float) -> None:
        """timeout: seconds without a byte after which a connection counts as dead."""
        self._timeout = timeout
        self._route: Route | None = None
        self._aborted = False

    def open(self, url: str, headers: Mapping[str, str], start: int, stop: int, size: int) -> Body:
        """Bytes start to stop (exclusive) of a file of `size`; or the whole file, where the server
        does not know ranges.

        Raises StatusError, BadAnswerError, and OSError or http.client.HTTPException for the line;
        HubError for a redirect that must not be followed.
        """
        request = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        for _ in range(MAX_REDIRECTS + 1):
            response = self._get(url, request)
            if response.status not in _REDIRECTS:
                return self._checked(response, start, stop, size)
            target = urljoin(url, response.headers.get("Location", ""))
            self._finish(response)
            check_redirect(url, target)
            if origin_of(url) != origin_of(target):
                request = {k: v for k, v in request.items() if k.lower() not in _SECRETS}
            url = target
        raise HubError(f"{_shown(url)}: more than {MAX_REDIRECTS} redirects")

    def abort(self) -> None:
        """Ends a read that is under way in another thread, and all that come."""
        self._aborted = True
        route = self._route
        if route is not None and route.connection.sock is not None:
            with contextlib.suppress(OSError):
                route.connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._route is not None:
            self._route.connection.close()
        self._route = None

    def _get(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        origin = origin_of(url)
        is_reused = self._route is not None and self._route.origin == origin
        if self._route is None or not is_reused:
            self.close()
            self._route = _route_to(origin, self._timeout)
        route = self._route
        if self._aborted:
            raise OSError("aborted")
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            route.connection.request(
                "GET", url if route.absolute else target, headers={**headers, **route.headers}
            )
            return route.connection.getresponse()
        except (OSError, http.client.HTTPException):
            self.close()
            if is_reused and not self._aborted:  # The server had closed what was kept.
                return self._get(url, headers)
            raise

    def _checked(
        self, response: http.client.HTTPResponse, start: int, stop: int, size: int
    ) -> Body:
        if response.status == 206:
            given = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            wanted = (str(start), str(stop - 1), str(size))
            if given is None or given.groups() != wanted:
                self.close()
                raise BadAnswerError(
                    f"bytes {start}-{stop - 1} of {size} were asked for, the answer says "
                    f"{response.headers.get('Content-Range', 'nothing')[:80]}"
                )
            if response.length != stop - start:
                self.close()
                raise BadAnswerError("the answer has another length than its own range")
            return Body(response, start, size, honours_range=True)
        if response.status == 200:
            if response.length != size:
                self.close()
                raise BadAnswerError(
                    f"a file of {size} bytes was asked for, the answer has "
                    f"{'no length' if response.length is None else response.length}"
                )
            return Body(response, 0, size, honours_range=False)
        retry_after = _seconds(response.headers.get("Retry-After"))
        self._finish(response)
        raise StatusError(response.status, retry_after)

    def _finish(self, response: http.client.HTTPResponse) -> None:
        """Of an answer nobody wants: the connection can serve again once it is read."""
        if response.length is not None and response.length <= MAX_SMALL_BODY:
            response.read()
        else:
            self.close()


def origin_of(url: str) -> Origin:
    """Raises HubError for an address that is no web address."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}[parts.scheme]
    except (KeyError, ValueError):
        raise HubError(f"{_shown(url)}: not an address of the web") from None
    if not parts.hostname:
        raise HubError(f"{_shown(url)}: an address without a host")
    return Origin(parts.scheme, parts.hostname, port)


def check_redirect(url: str, target: str) -> None:
    """Raises HubError for one that gives up encryption, or leads from a server elsewhere to this
    machine or its network."""
    source, destination = origin_of(url), origin_of(target)
    if source.scheme == "https" and destination.scheme != "https":
        raise HubError(f"{_shown(url)}: a redirect to {_shown(target)}, without encryption")
    if _is_inside(destination.host) and not _is_inside(source.host):
        raise HubError(f"{_shown(url)}: a redirect to {destination.host}, which is inside")


def _is_inside(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not address.is_global


def _route_to(origin: Origin, timeout: float) -> Route:
    proxy = _proxy_for(origin)
    if proxy is None:
        direct = _connection(origin.scheme, origin.host, origin.port, timeout)
        return Route(origin, direct, absolute=False, headers={})
    host, port = proxy.hostname or "", proxy.port or (443 if proxy.scheme == "https" else 80)
    headers = {}
    if proxy.username is not None:
        user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    if origin.scheme == "http":
        return Route(origin, _connection(proxy.scheme, host, port, timeout), True, headers)
    tunnel = _connection("https", host, port, timeout)
    tunnel.set_tunnel(origin.host, origin.port, headers)
    return Route(origin, tunnel, absolute=False, headers={})


def _connection(scheme: str, host: str, port: int, timeout: float) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=_certificates())
    return http.client.HTTPConnection(host, port, timeout=timeout)


@cache
def _certificates() -> ssl.SSLContext:
    """As huggingface_hub's requests trust them."""
    from httpx2 import create_ssl_context

    return create_ssl_context()


def _proxy_for(origin: Origin) -> SplitResult | None:
    """Of the environment or the system's settings."""
    proxies = getproxies()
    address = proxies.get(origin.scheme) or proxies.get("all")
    if not address or proxy_bypass(f"{origin.host}:{origin.port}"):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme not in ("http", "https"):
        raise HubError(
            f"proxy {proxy.scheme}://{proxy.hostname}", expected="an http:// proxy", found="another"
        )
    return proxy


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d{1,6}", text.strip()) else None


def _shown(url: str) -> str:
    """Without its query, where signatures stand."""
    return url.partition("?")[0][:200]
