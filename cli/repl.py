"""The interactive chat: a prompt with the keys people expect, and the loop around it.

Enter sends. A trailing backslash, Ctrl-J or Alt-Enter makes a new line; a block that starts with
triple quotes is sent when it is closed; pasted text never sends by itself.
"""

import os
import time
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output as TerminalOutput
from prompt_toolkit.shortcuts import CompleteStyle

from localr1.cli.completion import ChatCompleter
from localr1.cli.keyboard import deferred_interrupts, quiet_keyboard, whole_output
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.errors import LocalR1Error, OutputError

PROMPT = ">>> "
CONTINUATION = "... "
QUOTES = '"""'
LEAVE_SECONDS = 2.0
"""Two Ctrl-C within this time at the prompt leave."""
INTERRUPTED = 130


def open_history(path: Path) -> History:
    """Past lines, readable by their owner alone. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)  # Also when an earlier program made it wider.
    except OSError as error:
        raise OutputError(
            f"{path}: the history cannot be kept there",
            found=error.strerror,
            fix="Use --no-history.",
        ) from error
    return FileHistory(str(path))


def is_open_block(text: str) -> bool:
    """Whether text began a triple-quoted block and has not ended it."""
    stripped = text.strip()
    return stripped.startswith(QUOTES) and not (
        len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES)
    )


def message_of(text: str) -> str:
    """What a finished input says: a block without its quotes, else the line without its edges."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_open_block(stripped):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return stripped


def key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    # Not while Ctrl-R asks what to search for: Enter has another meaning there.
    in_message = has_focus(DEFAULT_BUFFER)

    @Condition
    def goes_on() -> bool:
        document = get_app().current_buffer.document
        at_end = not document.text_after_cursor.strip()
        return at_end and (document.text.endswith("\\") or is_open_block(document.text))

    @bindings.add("enter", filter=in_message & goes_on)
    def new_line_of_block(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @bindings.add("enter", filter=in_message & ~goes_on)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("c-j", filter=in_message)
    @bindings.add("escape", "enter", filter=in_message)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-x", "c-e")
    def edit(event: KeyPressEvent) -> None:
        """In $VISUAL or $EDITOR. What comes back is looked at once more before it is sent."""
        event.current_buffer.open_in_editor(validate_and_handle=False)

    return bindings


def make_prompt(
    session: ChatSession,
    history: History | None,
    *,
    terminal_input: Input | None = None,
    terminal_output: TerminalOutput | None = None,
) -> PromptSession[str]:
    """terminal_input, terminal_output: the process's own terminal when None."""
    return PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=CONTINUATION,
        key_bindings=key_bindings(),
        history=history or InMemoryHistory(),
        completer=ChatCompleter(session),
        complete_while_typing=False,
        # A menu would keep eight lines free below every prompt.
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_history_search=True,
        enable_suspend=True,
        tempfile_suffix=".md",
        input=terminal_input,
        output=terminal_output,
    )


def handle(session: ChatSession, text: str) -> None:
    """One input: a command or a message. A known error is one line; the conversation goes on."""
    try:
        if text.startswith("/"):
            run_slash_command(session, text)
        elif message_of(text):
            session.send(message_of(text))
    except LocalR1Error as error:
        session.output.error(str(error))
    except MemoryError:
        session.output.error("this machine has not enough memory for that.")
    except KeyboardInterrupt:
        session.output.note("(interrupted)")


def converse(session: ChatSession, prompt: PromptSession[str]) -> int:
    """Asks and answers until the user leaves; returns the exit code."""
    last_interrupt = -LEAVE_SECONDS
    with deferred_interrupts(), whole_output():
        while not session.ended:
            try:
                text = prompt.prompt(default=session.take_draft())
            except EOFError:
                return 0
            except KeyboardInterrupt:
                now = time.monotonic()
                if now - last_interrupt < LEAVE_SECONDS:
                    return INTERRUPTED
                last_interrupt = now
                session.output.note("Ctrl-C again leaves; so do /bye and Ctrl-D.")
                continue
            last_interrupt = -LEAVE_SECONDS
            with quiet_keyboard():
                handle(session, text)
    return 0
