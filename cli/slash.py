"""Slash commands of the chat: parsed here, carried out on the session, never sent to the model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from localr1.cli.experts import heat_map
from localr1.cli.parameters import suggestion
from localr1.cli.session import ChatSession
from localr1.cli.slash_files import complete_path, copy_answer, read_file
from localr1.cli.slash_model import complete_model, load_model
from localr1.cli.slash_sessions import (
    complete_session,
    edit,
    list_sessions,
    regenerate,
    resume,
    save,
)
from localr1.cli.slash_settings import complete_setting, set_something
from localr1.cli.slash_tokens import show_tokens
from localr1.errors import UsageError


@dataclass(frozen=True)
class SlashCommand:
    """help: a line of /help for each way to use it. run: gets what follows the name. complete: what
    may follow, given what is there so far: whole continuations of the rest of the line."""

    help: Mapping[str, str]
    run: Callable[[ChatSession, str], None]
    complete: Callable[[ChatSession, str], Iterable[str]] | None = None


KEYS = (
    "Enter sends; \\ at the end, Ctrl-J or Alt-Enter: a new line; text between",
    '""" and """ may span lines. Ctrl-X Ctrl-E: your editor. Ctrl-R searches.',
    "Ctrl-C stops a reply; at the prompt it clears the line, twice it leaves.",
)


def show_help(session: ChatSession, _: str) -> None:
    lines = [line for command in COMMANDS.values() for line in command.help.items()]
    width = max(len(usage) for usage, _ in lines)
    for usage, what in lines:
        session.output.line(f"{usage:<{width}}  {what}")
    for line in KEYS:
        session.output.line(line)


def leave(session: ChatSession, _: str) -> None:
    session.ended = True


def clear(session: ChatSession, _: str) -> None:
    session.conversation.clear()
    session.attached.clear()
    if session.keeper is not None:
        session.keeper.leave()
    session.output.note("The conversation starts anew.")


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
        session.output.prose(last.thinking.strip(), dim=True)


COMMANDS = {
    "help": SlashCommand({"/help, /?": "this list"}, show_help),
    "clear": SlashCommand({"/clear": "forget the conversation, keep the settings"}, clear),
    "set": SlashCommand(
        {
            "/set system TEXT": "who answers, from the next message on",
            "/set think on|off|N": "whether it thinks, or for N tokens at most",
            "/set format json|FILE": "JSON answers, as a schema in FILE; text: as ever",
            "/set full WHAT": "at the end of the context: stop, or drop-oldest",
            "/set parameter K V": "temperature, top_p, seed, max_tokens, ...",
        },
        set_something,
        complete_setting,
    ),
    "show": SlashCommand({"/show": "the model, its settings, the context used"}, show_state),
    "load": SlashCommand(
        {"/load MODEL [keep]": "another model; keep: with this conversation"},
        load_model,
        complete_model,
    ),
    "read": SlashCommand(
        {"/read FILE [QUESTION]": "put a text file in front of the next message"},
        read_file,
        complete_path,
    ),
    "think": SlashCommand({"/think": "the thinking of the last reply"}, show_thinking),
    "copy": SlashCommand(
        {"/copy [code]": "the last answer, or its code alone, to the clipboard"}, copy_answer
    ),
    "stats": SlashCommand({"/stats": "tokens and speed of the last reply; experts"}, show_stats),
    "tokens": SlashCommand(
        {"/tokens [TEXT]": "how full the context is; the tokens of TEXT"}, show_tokens
    ),
    "regen": SlashCommand({"/regen": "answer the last message again"}, regenerate),
    "edit": SlashCommand(
        {"/edit [N] [TEXT]": "go back to message N, or put TEXT in its place"}, edit
    ),
    "save": SlashCommand({"/save [NAME]": "keep this conversation, under a name"}, save),
    "resume": SlashCommand(
        {"/resume [ID]": "go on with a kept conversation"}, resume, complete_session
    ),
    "sessions": SlashCommand({"/sessions [rm ID]": "what is kept; delete it"}, list_sessions),
    "bye": SlashCommand({"/bye, /exit": "leave (also Ctrl-D)"}, leave),
}
ALIASES = {"?": "help", "exit": "bye"}


def names() -> list[str]:
    """Every word that may follow the slash."""
    return [*COMMANDS, *ALIASES]


def run_slash_command(session: ChatSession, line: str) -> None:
    """Carries out `/name rest`. Raises UsageError, for an unknown name with the nearest known."""
    name, _, rest = line.strip().removeprefix("/").partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        known = [f"/{each}" for each in names() if each != "?"]
        raise UsageError(
            f"unknown command /{name}, not sent to the model",
            fix=suggestion(f"/{name}", known) + " A message may start with a slash after a space.",
        )
    session.settling.stop()
    try:
        COMMANDS[name].run(session, rest.strip())
    finally:
        session.settle()
