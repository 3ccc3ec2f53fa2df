"""The way to the Hugging Face Hub: token, server and proxies, of which no secret is ever shown."""

import contextlib
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from localr1.doctor.finding import Finding, Verdict
from localr1.settings import Surroundings

HUB = "https://huggingface.co"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class NetworkFacts:
    """token_from: where a token is, "" for none. endpoint, proxies: without the name and password
    that an address may carry; "" for the usual server. proxies: as (of what, address)."""

    token_from: str
    endpoint: str
    is_offline: bool
    proxies: tuple[tuple[str, str], ...]


def read_network(
    surroundings: Surroundings,
    getproxies: Callable[[], Mapping[str, str]] = urllib.request.getproxies,
) -> NetworkFacts:
    """getproxies: those of the environment, of Windows' registry and of macOS' settings."""
    token_from = surroundings.token_variable
    if not token_from:
        with contextlib.suppress(OSError):
            if surroundings.token_file.read_bytes().strip():
                token_from = str(surroundings.token_file)
    return NetworkFacts(
        token_from=token_from,
        endpoint=bare_address(surroundings.endpoint),
        is_offline=surroundings.is_offline,
        proxies=tuple(
            (kind, value if kind == "no" else bare_address(value))
            for kind, value in sorted(getproxies().items())
        ),
    )


def bare_address(address: str) -> str:
    """Scheme, host, port and path of an address: names, passwords and keys may be in the rest."""
    if not address:
        return ""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not an address)"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}" if host else "(not an address)"


def network_findings(facts: NetworkFacts) -> tuple[Finding, ...]:
    return (_server(facts), _token(facts), _proxies(facts))


def _server(facts: NetworkFacts) -> Finding:
    value = f"{facts.endpoint} (HF_ENDPOINT)" if facts.endpoint else HUB
    if facts.is_offline:
        return Finding(
            "Hub",
            f"{value}, offline",
            Verdict.NOTE,
            "HF_HUB_OFFLINE is set, so that nothing is downloaded",
            "unset it to pull models",
        )
    if facts.endpoint == "(not an address)":
        return Finding(
            "Hub",
            value,
            Verdict.PROBLEM,
            "HF_ENDPOINT is set, but not to an address",
            f"set it to one such as {HUB}, or unset it",
        )
    scheme, host = urlsplit(facts.endpoint).scheme, urlsplit(facts.endpoint).hostname
    if scheme == "http" and host not in LOOPBACK and facts.token_from:
        return Finding(
            "Hub",
            value,
            Verdict.NOTE,
            "the token is sent there without encryption",
            "give HF_ENDPOINT an address that begins with https",
        )
    return Finding("Hub", value)


def _token(facts: NetworkFacts) -> Finding:
    if facts.token_from:
        return Finding("token", f"there is one ({facts.token_from}); never shown")
    return Finding("token", "none, which only gated and private models need: `hf auth login`")


def _proxies(facts: NetworkFacts) -> Finding:
    if not facts.proxies:
        return Finding("proxies", "none")
    named = (f"{'not for' if kind == 'no' else kind} {value}" for kind, value in facts.proxies)
    return Finding("proxies", ", ".join(named))
