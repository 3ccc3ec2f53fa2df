"""Slash commands of the chat: parsed here, carried out on the session, never sent to the model."""

from collections.abc import Callable
from dataclasses import dataclass

from localr1.cli.experts import heat_map
from localr1.cli.parameters import PARAMETERS, parse_parameter, suggestion
from localr1.cli.session import ChatSession
from localr1.cli.slash_sessions import edit, list_sessions, regenerate, resume, save
from localr1.cli.slash_set import set_format, set_full, set_thinking
from localr1.errors import UsageError


@dataclass(frozen=True)
class SlashCommand:
    usage: str
    help: str
    run: Callable[[ChatSession, str], None]


def show_help(session: ChatSession, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        session.output.line(f"  {command.usage:<{width}}  {command.help}")
    session.output.line()
    session.output.line(
        "Enter sends; a trailing \\, Ctrl-J or Alt-Enter starts a new line; "
        'text between """ and """ may span lines.'
    )
    session.output.line("Ctrl-C stops a reply; at the prompt it clears the line, twice it leaves.")


def leave(session: ChatSession, _: str) -> None:
    session.ended = True


def clear(session: ChatSession, _: str) -> None:
    session.conversation.clear()
    if session.keeper is not None:
        session.keeper.leave()
    session.output.note("The conversation starts anew.")


def set_something(session: ChatSession, rest: str) -> None:
    what, _, value = rest.partition(" ")
    if what == "system":
        session.conversation.system = value.strip() or None
        state = "set" if value.strip() else "removed"
        session.output.note(f"System prompt {state}, from the next message on.")
    elif what == "parameter":
        name, _, text = value.strip().partition(" ")
        if not name or not text.strip():
            names = ", ".join(PARAMETERS)
            raise UsageError(
                "/set parameter", expected="a name and a number", fix=f"Names: {names}."
            )
        session.conversation.set_parameter(name, parse_parameter(name, text.strip()))
        session.output.note(f"{name} = {text.strip()}")
    elif what in ("think", "nothink"):
        set_thinking(session, "off" if what == "nothink" else value.strip() or "on")
    elif what == "format":
        set_format(session, value.strip())
    elif what == "full":
        set_full(session, value.strip())
    else:
        raise UsageError(
            "/set",
            expected="`/set system TEXT`, `/set think on|off|N`, `/set parameter NAME VALUE`, "
            "`/set format text|json|FILE` or `/set full stop|drop-oldest`",
            found=repr(rest),
        )


def show_state(session: ChatSession, _: str) -> None:
    session.output.fields(session.conversation.describe())


def show_stats(session: ChatSession, _: str) -> None:
    last = session.last_reply
    session.output.line("No reply yet." if last is None else last.stats_line())
    store = session.conversation.engine.experts
    if last is not None and store is not None:
        session.output.line()
        for line in heat_map(store, session.output.console("stdout").width):
            session.output.line(line)


def show_thinking(session: ChatSession, _: str) -> None:
    last = session.last_reply
    if last is None or not last.thinking.strip():
        session.output.line("The last reply has no thinking.")
    else:
        session.output.text(last.thinking.strip() + "\n", dim=True)


COMMANDS = {
    "help": SlashCommand("/help, /?", "this list", show_help),
    "clear": SlashCommand("/clear", "forget the conversation, keep the settings", clear),
    "set": SlashCommand(
        "/set system TEXT, /set think on|off|N, /set parameter NAME VALUE",
        "change how it answers",
        set_something,
    ),
    "show": SlashCommand("/show", "the model, its settings, the context used", show_state),
    "stats": SlashCommand(
        "/stats", "tokens and speed of the last reply; which experts were chosen", show_stats
    ),
    "think": SlashCommand("/think", "the thinking of the last reply", show_thinking),
    "regen": SlashCommand("/regen", "answer the last message again", regenerate),
    "edit": SlashCommand(
        "/edit [N] [TEXT]", "go back to message N, or put TEXT in its place", edit
    ),
    "save": SlashCommand("/save [NAME]", "keep this conversation, under a name", save),
    "resume": SlashCommand("/resume [ID]", "go on with a kept conversation", resume),
    "sessions": SlashCommand("/sessions [rm ID]", "what is kept; delete it", list_sessions),
    "bye": SlashCommand("/bye, /exit", "leave (also Ctrl-D)", leave),
}
ALIASES = {"?": "help", "exit": "bye"}


def run_slash_command(session: ChatSession, line: str) -> None:
    """Carries out `/name rest`. Raises UsageError, for an unknown name with the nearest known."""
    name, _, rest = line.strip().removeprefix("/").partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        known = [f"/{each}" for each in (*COMMANDS, "exit")]
        raise UsageError(
            f"unknown command /{name}, not sent to the model",
            fix=suggestion(f"/{name}", known) + " A message may start with a slash after a space.",
        )
    session.settling.stop()
    try:
        COMMANDS[name].run(session, rest.strip())
    finally:
        session.settle()
