"""The one reader of the environment: every other module gets a `Settings`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import PlatformDirs

from localr1.errors import UsageError

MAX_THREADS = 1024


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    data_dir: quantized models. state_dir: chat history and sessions. cache_dir: what can be made
    again. With LOCALR1_HOME all three lie under it; else where the platform puts them (XDG).
    hub_cache: the Hugging Face cache, which keeps the originals (HF_HUB_CACHE, else HF_HOME/hub).
    threads: LOCALR1_THREADS, or None: as many as the machine has cores.
    color: True where FORCE_COLOR asks for it, False where NO_COLOR forbids it (which wins), None:
    colours on a terminal only. over_ssh: the terminal is on another machine.
    """

    data_dir: Path
    state_dir: Path
    cache_dir: Path
    hub_cache: Path
    threads: int | None
    color: bool | None
    over_ssh: bool

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> "Settings":
        """Read `environment` (the process's own by default).

        Raises UsageError for a value that cannot be meant. An empty variable counts as unset.
        """
        values = os.environ if environment is None else environment
        home = _path(values, "LOCALR1_HOME")
        if home is not None:
            data, state, cache = home / "data", home / "state", home / "cache"
        else:
            directories = PlatformDirs("localr1", appauthor=False)
            data = directories.user_data_path
            state = directories.user_state_path
            cache = directories.user_cache_path
        return Settings(
            data_dir=data,
            state_dir=state,
            cache_dir=cache,
            hub_cache=_hub_cache(values),
            threads=_threads(values),
            color=_color(values),
            over_ssh=bool(_first(values, "SSH_CONNECTION", "SSH_TTY")),
        )


@dataclass(frozen=True)
class Surroundings:
    """What else the environment says that decides how localr1 fares: for `localr1 doctor` alone.

    token_variable: the name of the variable that holds a Hugging Face token, "" for none;
    token_file: where one would be kept. No token is held here. endpoint: HF_ENDPOINT as it is, ""
    where it is not set. is_offline: HF_HUB_OFFLINE. visible_cards: CUDA_VISIBLE_DEVICES. locale:
    LC_ALL, LC_CTYPE or LANG, whichever decides. terminal: TERM. color_variable: NO_COLOR or
    FORCE_COLOR, whichever decides.
    """

    token_variable: str
    token_file: Path
    endpoint: str
    is_offline: bool
    visible_cards: str | None
    locale: str
    terminal: str
    color_variable: str

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> "Surroundings":
        """Read `environment`, the process's own by default, by the rules of those who own it."""
        values = os.environ if environment is None else environment
        offline = values.get("HF_HUB_OFFLINE") or values.get("TRANSFORMERS_OFFLINE") or ""
        return Surroundings(
            token_variable=_first(values, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"),
            token_file=_path(values, "HF_TOKEN_PATH") or _hub_home(values) / "token",
            endpoint=values.get("HF_ENDPOINT", "").rstrip("/"),
            is_offline=offline.upper() in ("1", "ON", "YES", "TRUE"),
            visible_cards=values.get("CUDA_VISIBLE_DEVICES"),
            locale=values.get(_first(values, "LC_ALL", "LC_CTYPE", "LANG"), ""),
            terminal=values.get("TERM", ""),
            color_variable=_first(values, "NO_COLOR", "FORCE_COLOR"),
        )


def _first(values: Mapping[str, str], *names: str) -> str:
    """The first of these variables that is set to something; "" for none."""
    return next((name for name in names if values.get(name, "").strip()), "")


def _path(values: Mapping[str, str], name: str) -> Path | None:
    text = values.get(name, "")
    return Path(text).expanduser().absolute() if text else None


def _hub_cache(values: Mapping[str, str]) -> Path:
    """huggingface_hub's own rule, which reads its variables when it is imported: too early here."""
    cache = _path(values, "HF_HUB_CACHE")
    if cache is not None:
        return cache
    return _hub_home(values) / "hub"


def _hub_home(values: Mapping[str, str]) -> Path:
    home = _path(values, "HF_HOME")
    if home is not None:
        return home
    xdg = _path(values, "XDG_CACHE_HOME")
    return (xdg if xdg is not None else Path.home() / ".cache") / "huggingface"


def _threads(values: Mapping[str, str]) -> int | None:
    text = values.get("LOCALR1_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_THREADS):
        raise UsageError(
            "LOCALR1_THREADS",
            expected=f"a number from 1 to {MAX_THREADS}",
            found=repr(text[:40]),
            fix="Set it to the number of cores to use, or unset it.",
        )
    return int(text)


def _color(values: Mapping[str, str]) -> bool | None:
    if values.get("NO_COLOR"):
        return False
    if values.get("FORCE_COLOR"):
        return True
    return None
