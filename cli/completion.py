"""Tab in the chat: commands, what may follow them, models and files."""

from collections.abc import Iterator

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from localr1.cli.session import ChatSession
from localr1.cli.slash import ALIASES, COMMANDS, names


def _command(name: str) -> str:
    """With the space that what follows it needs."""
    command = COMMANDS[ALIASES.get(name, name)]
    return name if command.complete is None else f"{name} "


class ChatCompleter(Completer):
    """Completes what begins with a slash; a message is the user's own."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        word, space, rest = line[1:].partition(" ")
        if not space:
            candidates = sorted(_command(name) for name in names() if name.isalpha())
            typed = word
        else:
            command = COMMANDS.get(ALIASES.get(word, word))
            if command is None or command.complete is None:
                return
            candidates = list(command.complete(self._session, rest))
            typed = rest
        for candidate in candidates:
            # A file's name may have got the quote it needs.
            if candidate.startswith(typed) or candidate.startswith(f'"{typed}'):
                yield Completion(candidate, start_position=-len(typed))
