"""/set: what changes how the model answers."""

from collections.abc import Callable, Iterable

from localr1.cli.chat_options import ON_FULL
from localr1.cli.parameters import PARAMETERS, parse_parameter, suggestion
from localr1.cli.session import ChatSession
from localr1.cli.slash_set import set_format, set_full, set_thinking
from localr1.errors import UsageError


def set_system(session: ChatSession, text: str) -> None:
    session.conversation.system = text or None
    state = "set" if text else "removed"
    session.output.note(f"System prompt {state}, from the next message on.")


def set_parameter(session: ChatSession, rest: str) -> None:
    name, _, text = rest.partition(" ")
    if not name or not text.strip():
        names = ", ".join(PARAMETERS)
        raise UsageError("/set parameter", expected="a name and a number", fix=f"Names: {names}.")
    session.conversation.set_parameter(name, parse_parameter(name, text.strip()))
    session.output.note(f"{name} = {text.strip()}")


def set_think(session: ChatSession, text: str) -> None:
    set_thinking(session, text or "on")


def set_nothink(session: ChatSession, _: str) -> None:
    set_thinking(session, "off")


SETTINGS: dict[str, Callable[[ChatSession, str], None]] = {
    "system": set_system,
    "parameter": set_parameter,
    "think": set_think,
    "nothink": set_nothink,
    "format": set_format,
    "full": set_full,
}


VALUES = {
    "parameter": tuple(PARAMETERS),
    "think": ("on", "off"),
    "format": ("text", "json"),
    "full": ON_FULL,
}
"""What Tab offers behind them."""


def set_something(session: ChatSession, rest: str) -> None:
    """`/set WHAT VALUE`. Raises UsageError."""
    what, _, value = rest.partition(" ")
    if what not in SETTINGS:
        raise UsageError(
            f"/set {what}".rstrip(),
            expected="`/set system TEXT`, `/set think on|off|N`, `/set parameter NAME VALUE`, "
            "`/set format text|json|FILE` or `/set full stop|drop-oldest`",
            fix=suggestion(what, SETTINGS) if what else None,
        )
    SETTINGS[what](session, value.strip())


def complete_setting(session: ChatSession, rest: str) -> Iterable[str]:
    what, space, _ = rest.partition(" ")
    if space:
        return [f"{what} {value}" for value in VALUES.get(what, ())]
    return [f"{name} " for name in SETTINGS]
